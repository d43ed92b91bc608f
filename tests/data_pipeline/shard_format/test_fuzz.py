"""Thousands of damaged shard folders: an error in one line, or the very samples that were written.

Each example changes some bytes of one file, in one of the ways in which disks, copies and hands do
it, and reads everything in three ways. Nothing else may come out: no other exception, no sample
that differs, under `skip` no token that was not written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import read_index
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DamagedDataError, InputError
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.reading.batch import Sample
from data_pipeline.reading.samples import SampleReader
from data_pipeline.shard_format.table import CHECKSUM_TOKENS
from tests.support.samples import check_sources
from tests.support.tiny_shards import NUMBERED_VOCAB, config_of, write_numbered_folder

LENGTHS = [3, 5, 40, 1, 9, 2 * CHECKSUM_TOKENS + 50, 30, 2]
SEQ_LEN = 256
EXAMPLES = 3000
KINDS = ("flip", "set", "cut", "extend", "zero", "swap", "repeat", "delete", "empty", "exchange")


@dataclass(frozen=True)
class Damage:
    """One change of one file; positions are shares of its length."""

    file: int
    kind: str
    position: float
    length: int
    value: int

    def apply(self, files: list[Path]) -> None:
        """Changes the file."""
        path = files[self.file % len(files)]
        if self.kind == "delete":
            path.unlink()
            return
        contents = bytearray(path.read_bytes())
        at = int(self.position * len(contents))
        stop = min(at + self.length, len(contents))
        if self.kind == "flip":
            contents[at] ^= 1 << self.value % 8
        elif self.kind == "set":
            contents[at] = self.value
        elif self.kind == "cut":
            del contents[at:]
        elif self.kind == "extend":
            contents += bytes([self.value]) * self.length
        elif self.kind == "zero":
            contents[at:stop] = bytes(stop - at)
        elif self.kind == "swap":
            half = len(contents) // 2
            contents[at:stop], contents[half : half + stop - at] = (
                contents[half : half + stop - at],
                contents[at:stop],
            )
        elif self.kind == "repeat":
            contents[at:at] = contents[at:stop]
        elif self.kind == "empty":
            contents.clear()
        else:
            contents = bytearray(files[(self.file + 1) % len(files)].read_bytes())
        path.write_bytes(contents)


def damages() -> st.SearchStrategy[Damage]:
    """Draws a damage."""
    return st.builds(
        Damage,
        file=st.integers(0, 63),
        kind=st.sampled_from(KINDS),
        position=st.floats(0, 0.9999),
        length=st.integers(1, 600),
        value=st.integers(0, 255),
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of several shards."""
    folder = tmp_path_factory.mktemp("sound") / "shards"
    write_numbered_folder(folder, LENGTHS, 60)
    assert not list(verify_folder(read_index(folder)))
    return folder


@pytest.fixture(scope="module")
def whole(sound: Path) -> list[Sample]:
    """Its samples."""
    return read_all(configuration(sound))


def configuration(folder: Path) -> DataConfig:
    """Reads a folder without any patience."""
    source = SourceConfig(str(folder), name="numbers")
    return config_of(source, seq_len=SEQ_LEN, read_attempts=1, shuffle_block=4)


def read_all(data: DataConfig) -> list[Sample]:
    """The samples of an epoch and some of the next."""
    reader = SampleReader(data)
    num_windows = -(-(sum(LENGTHS) + len(LENGTHS)) // SEQ_LEN)
    return [reader.sample(number) for number in range(num_windows + 3)]


def equal(left: Sample, right: Sample) -> bool:
    """Whether two samples are the same in every field."""
    return left.document_ids == right.document_ids and all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("tokens_T", "labels_T", "cu_seqlens")
    )


def outcome(folder: Path, whole: list[Sample]) -> str:
    """Reads a damaged folder in every way and says what came of it."""
    data = configuration(folder)
    said = ""
    try:
        check_sources(data, NUMBERED_VOCAB)
        found = read_all(data)
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and str(folder) in said
    else:
        assert all(equal(*pair) for pair in zip(found, whole, strict=True))
    try:
        skipping = read_all(replace(data, on_damage="skip"))
    except InputError as error:  # only a folder whose index is of no use
        assert not isinstance(error, DamagedDataError)
        return "refused"
    for sample, written in zip(skipping, whole, strict=True):
        # In their places or left out, with a record of it: never another token.
        left = set(sample.tokens_T.tolist()) - set(written.tokens_T.tolist())
        assert left <= {0}
        lost = sum(place.num_tokens for place in sample.skipped)
        assert len(written.tokens_T) - lost <= len(sample.tokens_T)
        assert lost or equal(sample, written) or said
    if any(sample.skipped for sample in skipping):
        assert said
        return "skipped"
    return "found" if said else "harmless"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that is made afresh for each example."""
    yield tmp_path / "copy"
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)


OUTCOMES: Counter[str] = Counter()


@pytest.mark.slow(45)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damage=damages())
def test_damage_is_named_or_harmless(
    damage: Damage, sound: Path, whole: list[Sample], copy: Path
) -> None:
    """Any change of any file."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sound, copy)
    files = sorted(copy.iterdir())
    before = [meaning(file) for file in files]
    damage.apply(files)
    changed = [meaning(file) for file in files] != before
    said = outcome(copy, whole)
    OUTCOMES[said] += 1
    if changed:
        problems = verify_says(copy)
        assert problems, damage  # verify misses nothing, whatever reading makes of it
    else:
        assert said == "harmless"


def meaning(file: Path) -> Any:
    """The bytes of a file; those of an index without the blanks between its entries."""
    if not file.exists():
        return None
    contents = file.read_bytes()
    if file.name == "index.json":
        with contextlib.suppress(ValueError):
            return json.loads(contents, object_pairs_hook=list)
    return contents


def verify_says(folder: Path) -> list[str]:
    """What `data verify` finds, or the error that it ends with."""
    try:
        return list(verify_folder(read_index(folder)))
    except InputError as error:
        return [str(error)]


def test_the_fuzzing_was_not_vacuous() -> None:
    """Every kind of outcome was met many times; runs after the test above."""
    if not OUTCOMES:
        pytest.skip("the test before this one did not run; run the whole file")
    assert sum(OUTCOMES.values()) >= EXAMPLES
    assert min(OUTCOMES[kind] for kind in ("refused", "skipped", "harmless")) > EXAMPLES // 50
