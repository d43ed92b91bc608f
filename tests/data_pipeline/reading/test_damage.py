"""Damaged shards under data.on_damage: skip: the rest is trained, and what is lost is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import open_samples, read_index
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DamagedDataError
from data_pipeline.reading.batch import Sample
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.packing import EMPTY_DOCUMENT
from data_pipeline.reading.sources import check_shards
from data_pipeline.shard_format.table import decode_table
from tests.support.damage import flip
from tests.support.samples import epoch_of
from tests.support.tiny_shards import EOS, config_of

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [30, 5, 1, 20, 9, 44, 16, 16, 3]
KINDS = ["missing shard", "missing table", "truncated tar", "flipped token"]


def damage(source: SourceConfig, kind: str) -> set[int]:
    """Damages the second shard and returns the documents that are lost."""
    index = read_index(source.path)
    shard = index.shards[1]
    tar, table = (Path(source.path) / name for name in (shard.tar_name, shard.table_name))
    rows = decode_table(table.read_bytes()).rows
    first = index.shards[0].num_documents
    own = set(range(first, first + shard.num_documents))
    if kind == "missing shard":
        tar.unlink()
    elif kind == "missing table":
        table.unlink()
    elif kind == "truncated tar":
        tar.write_bytes(tar.read_bytes()[: int(rows["tokens_offset"][-1]) + 1])
        return {max(own)}
    else:
        flip(tar, int(rows["tokens_offset"][0]) + 1)
        return {min(own)}
    return own


def labels_by_place(samples: list[Sample]) -> dict[int, list[int]]:
    """Labels of each sample that are not end-of-text."""
    return {s.index: [label for label in s.labels_T.tolist() if label != EOS] for s in samples}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_damaged_is_left_out(kind: str, make_numbered: MakeNumbered) -> None:
    """The order of the rest is what it was, sample by sample; each lost place is recorded."""
    source = make_numbered(LENGTHS)
    data = config_of(source, seq_len=16, shuffle_block=4)
    sound = epoch_of(data)
    lost = damage(source, kind)
    ends = np.cumsum(LENGTHS)
    lost_tokens = {t for d in lost for t in range(ends[d] - LENGTHS[d] + 1, ends[d] + 1)}
    with pytest.raises(DamagedDataError):
        epoch_of(data)
    skipping = replace(data, on_damage="skip")
    found = epoch_of(skipping)
    assert [sample.index for sample in found] == [sample.index for sample in sound]
    for number, labels in labels_by_place(sound).items():
        kept = [label for label in labels if label not in lost_tokens]
        assert labels_by_place(found)[number] == kept
    places = sum(LENGTHS[d] + 1 for d in lost)
    assert sum(place.num_tokens for sample in found for place in sample.skipped) == places
    for sample, whole in zip(found, sound, strict=True):
        left_out = sum(place.num_tokens for place in sample.skipped)
        empty = sample.document_ids == (EMPTY_DOCUMENT,)
        assert len(sample.tokens_T) == len(whole.tokens_T) - left_out + empty
        assert all(p.sample == sample.index and p.reason for p in sample.skipped)
    # as a function of the bytes: the next epoch lacks the same tokens
    again = epoch_of(skipping, 1)
    assert sum(place.num_tokens for sample in again for place in sample.skipped) == places


def test_a_sample_of_which_nothing_is_left_is_an_empty_document(
    make_numbered: MakeNumbered,
) -> None:
    """A step keeps its number of samples."""
    source = make_numbered([40, 40], shard_tokens=40)
    Path(source.path, "shard-000001.tar").unlink()
    data = config_of(source, seq_len=8, on_damage="skip")
    samples = epoch_of(data)
    empty = [sample for sample in samples if sample.document_ids == (EMPTY_DOCUMENT,)]
    assert len(empty) >= 3
    assert all(sample.labels_T.tolist() == sample.tokens_T.tolist() == [EOS] for sample in empty)
    loader = StepLoader(data, global_batch_size=len(samples), micro_batch_size=1)
    step = next(loader)
    loader.close()
    assert [batch.num_tokens for batch in step.micro_batches] == [
        len(sample.tokens_T) for sample in samples
    ]
    assert sum(place.num_tokens for place in step.skipped) == 41


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_leaves_out_the_same(kind: str, make_numbered: MakeNumbered) -> None:
    """Whoever reads a sample: 1, 2 and 4 ranks, and a stream that starts in the middle."""
    source = make_numbered(LENGTHS)
    damage(source, kind)
    data = config_of(source, seq_len=16, on_damage="skip")
    samples = list(islice(open_samples(data), 12))
    assert any(sample.skipped for sample in samples)
    for ranks in (1, 2, 4):
        places = []
        for rank in range(ranks):
            loader = StepLoader(
                data,
                global_batch_size=4,
                micro_batch_size=1,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                start_sample=4,
            )
            places += [place for step in islice(loader, 2) for place in step.skipped]
            loader.close()
        expected = [place for sample in samples[4:] for place in sample.skipped]
        assert sorted(places, key=str) == sorted(expected, key=str)


def test_damaged_metadata_costs_a_name_and_no_token(make_numbered: MakeNumbered) -> None:
    """The name is for people; training reads tokens."""
    source = make_numbered([5, 6])
    sound = epoch_of(config_of(source))
    flip(Path(source.path) / "shard-000000.tar", 512)
    with pytest.raises(DamagedDataError, match="metadata"):
        epoch_of(config_of(source))
    found = epoch_of(config_of(source, on_damage="skip"))
    assert np.array_equal(found[0].tokens_T, sound[0].tokens_T)
    assert sorted(found[0].document_ids) == ["1", "shard-000000, document 0"]
    assert not found[0].skipped


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_processes_share_the_look_at_the_shards(
    num_parts: int, make_numbered: MakeNumbered
) -> None:
    """Together they find what one finds."""
    train = make_numbered([4] * 12, shard_tokens=4, name="one")
    valid = make_numbered([4] * 6, shard_tokens=4, name="two")
    data = DataConfig(train=(train,), valid=(valid,))
    assert check_shards(data) == []
    for folder, shards in ((train.path, (2, 7)), (valid.path, (5,))):
        for shard in shards:
            Path(folder, f"shard-{shard:06d}.tar").unlink()
    found = [shard for part in range(num_parts) for shard in check_shards(data, part, num_parts)]
    places = sorted((shard.split, shard.source, shard.shard) for shard in found)
    assert places == [("train", 0, 2), ("train", 0, 7), ("valid", 0, 5)]
    assert all("missing" in shard.problem and shard.num_tokens == 5 for shard in found)
