"""Samples by number: each token once an epoch, and a start anywhere equals having read up to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import open_samples
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.reading import order, packing
from data_pipeline.reading.batch import Sample
from tests.support.samples import assert_trained_once, check_sources, epoch_of
from tests.support.tiny_shards import (
    EOS,
    NUMBERED_VOCAB,
    config_of,
    one_line,
    write_numbered_folder,
)

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [1, 7, 40, 3, 1, 90, 16, 15, 17, 2, 33]
"""One-token documents, documents around a window of 16, documents of several windows."""


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    shard_tokens=st.sampled_from([1, 30, 100, 10_000]),
    seq_len=st.integers(1, 70),
    shuffle_block=st.sampled_from([1, 3, 1024]),
    seed=st.integers(0, 3),
)
def test_an_epoch_trains_each_token_of_any_corpus_once(
    lengths: list[int], shard_tokens: int, seq_len: int, shuffle_block: int, seed: int
) -> None:
    """Several shards, windows longer and shorter than documents, any seed; two epochs each."""
    with tempfile.TemporaryDirectory() as folder:
        index = write_numbered_folder(Path(folder), lengths, shard_tokens)
        data = config_of(
            SourceConfig(folder), seq_len=seq_len, shuffle_block=shuffle_block, seed=seed
        )
        for epoch in (0, 1):
            samples = epoch_of(data, epoch)
            assert len(samples) == -(-index.num_stream_tokens // seq_len)
            assert_trained_once(samples, lengths)
            sizes = sorted(len(sample.tokens_T) for sample in samples)
            assert sizes[1:] == [seq_len] * (len(sizes) - 1)


@pytest.mark.parametrize("purpose", [order.DOCUMENT_ORDER, order.WINDOW_ORDER])
def test_a_permutation_that_repeats_an_entry_is_caught(
    purpose: int, make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the property above; equal documents, so that no length gives it away."""
    lengths = [5] * 20
    data = config_of(make_numbered(lengths))
    assert_trained_once(epoch_of(data), lengths)
    sound = order.permutation

    def broken(size: int, seed: int, *key: int) -> np.ndarray:
        permuted = sound(size, seed, *key)
        if key[0] == purpose:
            permuted[0] = permuted[-1]
        return permuted

    monkeypatch.setattr(order, "permutation", broken)
    with pytest.raises(AssertionError):
        assert_trained_once(epoch_of(data), lengths)


@pytest.mark.parametrize("fault", ["label at the cut", "document start", "order of pieces"])
def test_a_packer_with_a_fault_is_caught(
    fault: str, make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the faults that a packer of cut documents is prone to."""
    data = config_of(make_numbered(LENGTHS))
    sound = packing.make_sample

    def broken(window: packing.Window) -> Sample:
        if fault == "label at the cut":
            window.last_labels[-1] = np.array([EOS], "<u2").tobytes()
        elif fault == "document start":
            window.inputs[0] = window.inputs[0][2:]
            window.lengths[0] -= 1
        else:
            window.lengths.reverse()
            window.document_ids.reverse()
        return sound(window)

    monkeypatch.setattr("data_pipeline.reading.samples.make_sample", broken)
    with pytest.raises(AssertionError):
        assert_trained_once(epoch_of(data), LENGTHS)


def test_every_epoch_has_its_own_order(make_numbered: MakeNumbered) -> None:
    """Same tokens, other neighbours and other windows."""
    data = config_of(make_numbered(LENGTHS))
    orders = [
        np.concatenate([sample.labels_T for sample in epoch_of(data, epoch)]) for epoch in range(3)
    ]
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert not np.array_equal(orders[one], orders[other])
        assert np.array_equal(np.sort(orders[one]), np.sort(orders[other]))


def test_the_seed_changes_the_order_and_nothing_else_does(make_numbered: MakeNumbered) -> None:
    """None counts as seed 0."""
    source = make_numbered(LENGTHS)
    first = [sample.tokens_T for sample in epoch_of(config_of(source, seed=1))]
    again = [sample.tokens_T for sample in epoch_of(config_of(source, seed=1, prefetch_steps=7))]
    other = [sample.tokens_T for sample in epoch_of(config_of(source, seed=2))]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    default = next(open_samples(config_of(source)))
    assert np.array_equal(default.tokens_T, next(open_samples(config_of(source, seed=0))).tokens_T)


def same(left: Sample, right: Sample) -> bool:
    """Whether two samples are equal in every field."""
    return (
        (left.index, left.source, left.epoch, left.document_ids)
        == (right.index, right.source, right.epoch, right.document_ids)
        and np.array_equal(left.tokens_T, right.tokens_T)
        and np.array_equal(left.labels_T, right.labels_T)
        and np.array_equal(left.cu_seqlens, right.cu_seqlens)
    )


def test_a_start_at_k_gives_the_tail_of_the_stream(make_numbered: MakeNumbered) -> None:
    """Two sources, several epochs and periods, windows permuted in blocks that do not divide."""
    data = config_of(
        make_numbered(LENGTHS, name="one", weight=0.7),
        make_numbered([5, 60, 1, 1, 30], name="two", weight=0.3),
        shuffle_block=4,
        seed=3,
    )
    stream = list(islice(open_samples(data), 120))
    assert {sample.source for sample in stream} == {"one", "two"}
    assert max(sample.epoch for sample in stream) >= 3
    for start in [*range(0, 40), 41, 59, 77, 99, 119]:
        tail = islice(open_samples(data, start=start), 120 - start)
        for expected, found in zip(stream[start:], tail, strict=True):
            assert same(expected, found), start


def test_each_source_of_a_mixture_is_trained_once_an_epoch(make_numbered: MakeNumbered) -> None:
    """The mixture decides when a sample comes, never which: the epochs stay whole."""
    lengths = {"one": LENGTHS, "two": [5, 60, 1, 1, 30]}
    data = config_of(
        make_numbered(lengths["one"], name="one", weight=2),
        make_numbered(lengths["two"], name="two", weight=1),
    )
    stream = list(islice(open_samples(data), 100))
    for name, expected in lengths.items():
        first_epoch = [s for s in stream if s.source == name and s.epoch == 0]
        assert_trained_once(first_epoch, expected)


def test_a_far_start_reads_no_more_than_a_near_one(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts reads, not seconds: a sample 10^15 samples in costs what a near one costs."""
    data = config_of(make_numbered(LENGTHS * 3))
    reads = 0
    sound = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal reads
        reads += 1
        contents: bytes = sound(descriptor, size, offset)
        return contents

    monkeypatch.setattr("os.pread", counted)
    sample = next(open_samples(data, start=10**15))
    assert sample.index == 10**15
    assert 0 < reads <= 2 * len(sample.document_ids)


def test_held_out_samples_come_from_the_valid_sources(make_numbered: MakeNumbered) -> None:
    """The split names the list; any other name and an empty list are refused."""
    data = DataConfig(
        train=(make_numbered([3], name="one"),), valid=(make_numbered([4], name="two"),)
    )
    assert next(open_samples(data, split="valid")).source == "two"
    with pytest.raises(InputError, match="split"):
        open_samples(data, split="test")
    with pytest.raises(InputError, match=r"data\.valid"):
        open_samples(DataConfig(train=data.train), split="valid")
    with pytest.raises(InputError, match="start = -1"):
        open_samples(data, start=-1)


def test_the_summary_counts_the_tokens_of_an_epoch(make_numbered: MakeNumbered) -> None:
    """As trained: each document brings one more than its text; what is held out is not trained."""
    numbered = make_numbered([3, 4], name="one")
    with pytest.raises(InputError, match="tokenizer"):
        check_sources(config_of(numbered, tokenizer="/nowhere"), NUMBERED_VOCAB)
    train = (numbered, make_numbered([5], name="two", weight=3.0))
    data = DataConfig(train=train, valid=(make_numbered([9], name="three"),))
    assert check_sources(data, NUMBERED_VOCAB).train_tokens == 4 + 5 + 6


def test_sources_that_do_not_fit_the_run_are_named(
    make_numbered: MakeNumbered, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """Each message is one line with the way out."""
    numbered = make_numbered([3, 4])
    real = SourceConfig(str(make_shards("real")))
    with pytest.raises(InputError, match=r"vocab_size = 7.*token 7.*vocab_size >= 8") as error:
        check_sources(config_of(numbered), 7)
    one_line(error)
    check_sources(config_of(numbered), 8)
    with pytest.raises(InputError, match="different tokenizers") as error:
        check_sources(config_of(numbered, real), NUMBERED_VOCAB)
    one_line(error)
    with pytest.raises(InputError, match="does not exist") as error:
        check_sources(config_of(SourceConfig(str(tmp_path / "absent"))), NUMBERED_VOCAB)
    one_line(error)
    with pytest.raises(InputError, match=r"data\.train = \[\]"):
        check_sources(DataConfig(), NUMBERED_VOCAB)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no index\.json") as error:
        check_sources(config_of(SourceConfig(str(tmp_path / "empty"))), NUMBERED_VOCAB)
    one_line(error)


def test_another_tokenizer_than_the_shards_have_is_refused(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """data.tokenizer may name the same contents elsewhere, and nothing else."""
    folder = make_shards()
    contents = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "same.json").write_bytes(contents)
    (tmp_path / "other.json").write_bytes(contents + b"\n")
    source = SourceConfig(str(folder))
    summary = check_sources(config_of(source, tokenizer=str(tmp_path / "same.json")), 300)
    assert summary.tokenizer.contents == contents
    assert check_sources(config_of(source), 300).tokenizer.path == folder / "tokenizer.json"
    with pytest.raises(InputError, match=r"data\.tokenizer") as error:
        check_sources(config_of(source, tokenizer=str(tmp_path / "other.json")), 300)
    one_line(error)
