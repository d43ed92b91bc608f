"""Readers killed at any sample and started on another number of ranks: one stream, joined."""

from __future__ import annotations

import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest

from data_pipeline import open_samples
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.reading.batch import batch_digest, sample_digest
from tests.support.paths import ROOT
from tests.support.reading_process import GLOBAL_BATCH_SIZE
from tests.support.tiny_shards import config_of

MakeNumbered = Callable[..., SourceConfig]
KILLS = 50
LENGTHS = [1, 7, 40, 3, 1, 90, 16, 15, 17, 2, 33] * 4


@pytest.fixture
def data(make_numbered: MakeNumbered) -> DataConfig:
    """Two sources of several epochs each."""
    one = make_numbered(LENGTHS, name="one", weight=0.7)
    two = make_numbered([5, 60, 1, 1, 30] * 3, name="two", weight=0.3)
    return config_of(one, two, shuffle_block=8, seed=5)


def read_until_killed(folder: Path, ranks: int, num_steps: int) -> list[tuple[int, str]]:
    """Starts a reader and kills it as soon as it has told of so many steps."""
    command = [sys.executable, "-m", "tests.support.reading_process", str(folder), str(ranks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = list(islice(process.stdout, num_steps))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL and len(lines) >= num_steps
    whole = [line.split() for line in lines if line.endswith("\n")]
    return [(int(first), digest) for first, digest in whole]


@pytest.mark.slow(15)
def test_a_stream_joined_from_killed_readers_is_the_undisturbed_one(
    data: DataConfig, tmp_path: Path
) -> None:
    """At 50 random steps, on 1, 2, 4 and 8 ranks in turn; what is read twice is the same twice."""
    (tmp_path / "call.pickle").write_bytes(pickle.dumps(data))
    draw = random.Random(0)
    told: dict[int, str] = {}
    replayed = 0
    for ranks in islice(cycle([1, 2, 4, 8]), KILLS):
        for first, digest in read_until_killed(tmp_path, ranks, draw.randint(1, 9)):
            replayed += first in told
            assert told.setdefault(first, digest) == digest
    firsts = sorted(told)
    assert firsts == list(range(0, len(firsts) * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE))
    assert len(firsts) > 2 * KILLS and replayed > KILLS // 2
    stream = islice(open_samples(data), len(firsts) * GLOBAL_BATCH_SIZE)
    digests = [sample_digest(sample.index, sample.tokens_T) for sample in stream]
    for first in firsts:
        assert told[first] == batch_digest(digests[first : first + GLOBAL_BATCH_SIZE])
    assert len(set(told.values())) == len(told)
