"""What the reading benchmark compares reads the same tokens, and what is called bare is bare."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_reading import OURS, ways_of
from benchmarks.measuring import Timing, interleaved, speed_ratio
from benchmarks.reading_ways import MappedTokens, config_for, reads_of, stock_windows, tar_paths
from benchmarks.synthetic_corpus import document_lengths, write_corpus
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.reading.samples import SampleReader
from data_pipeline.reading.shards import open_documents
from data_pipeline.shard_format.index import ShardIndex

SEQ_LEN = 256


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "web", 3, 40_000)


def test_the_made_up_corpus_is_a_sound_shard_folder(index: ShardIndex) -> None:
    problems = [problem.rpartition("/")[2] for problem in verify_folder(index)]
    assert problems == ["prepared.json: missing"]  # true: no `prepare` has made it
    assert index.num_tokens == 120_000 and index.num_documents == 3 * 56
    lengths = document_lengths(5, 14_005, 10_000_000)
    assert lengths.sum() == 10_000_000 and lengths.min() >= 1
    assert np.array_equal(lengths, document_lengths(5, 14_005, 10_000_000))
    assert not np.array_equal(lengths, document_lengths(6, 14_005, 10_000_000))


def test_every_way_reads_the_tokens_of_the_corpus(
    index: ShardIndex, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Each loses at most the window in which its stream ends."""
    expected: Counter[int] = Counter({index.eos_id: index.num_documents})
    for document in open_documents(index.location):
        expected.update(document.tokens_T.tolist())
    reader = SampleReader(config_for(index.location, SEQ_LEN))
    num_windows = -(-index.num_stream_tokens // SEQ_LEN)
    ours = [reader.sample(number).tokens_T for number in range(num_windows)]
    mapped = MappedTokens(index, tmp_path, SEQ_LEN)
    theirs = {
        "ours": ours,
        "memory-mapped": [mapped[number][0] for number in range(len(mapped))],
        "webdataset": list(stock_windows(index, SEQ_LEN)),
    }
    for name, windows in theirs.items():
        assert all(window.dtype == np.int64 for window in windows), name
        found = Counter(np.concatenate(windows).tolist())
        assert not found - expected, name
        assert (expected - found).total() <= (0 if name == "ours" else SEQ_LEN + 1), name
    inputs, labels = mapped[0]
    assert np.array_equal(inputs[1:], labels[:-1]) and len(labels) == SEQ_LEN


def test_the_bare_reads_are_those_of_our_samples(index: ShardIndex) -> None:
    """Few bytes beyond the tokens: whole checksum blocks around the two ends of a window."""
    reads = reads_of(index.location, SEQ_LEN, 100)
    assert {path for path, _, _ in reads} <= set(tar_paths(index))
    assert 100 * SEQ_LEN * 2 * 0.9 < sum(size for _, size, _ in reads) < 100 * (SEQ_LEN + 4096) * 2
    assert reads == reads_of(index.location, SEQ_LEN, 100) != sorted(reads)


def test_a_piece_of_work_of_any_way_is_about_as_many_tokens_as_it_says(
    index: ShardIndex, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    ways = ways_of(index, tmp_path, 2048, tokens=100_000)
    timings = interleaved(ways, rounds=2)
    assert OURS in timings and len(timings) >= 9
    for name, found in timings.items():
        assert len(found) == 2, name
        assert all(100_000 * 0.9 < timing.tokens < 100_000 * 1.9 for timing in found), name


def test_a_ratio_of_speeds_is_taken_round_by_round() -> None:
    slow = [Timing(10, 1.0, 1.0), Timing(10, 4.0, 1.0), Timing(10, 1.0, 1.0)]
    fast = [Timing(20, 1.0, 1.0), Timing(20, 4.0, 1.0), Timing(30, 1.0, 1.0)]
    assert speed_ratio(fast, slow) == {"median": 2.0, "min": 2.0, "max": 3.0}
