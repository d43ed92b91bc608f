"""A tiny corpus, configs that train on it, and a small run as a YAML file."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadlcm.config import RunConfig
from tests.support.tiny_runs import tiny_run, write_corpus

RUN = """\
name: small
seed: 3
output_dir: runs/small
model:
  vocab_size: 512
  d_token: 32
  d_concept: 64
  encoder_layers: 1
  backbone_layers: 2
  decoder_layers: 1
  token_heads: 4
  token_kv_heads: 2
  concept_heads: 4
  concept_kv_heads: 2
  token_ffn_size: 64
  concept_ffn_size: 128
data:
  train: [{path: shards/web, weight: 2, name: web}]
  seq_len: 128
training:
  train_steps: 10
  global_batch_size: 8
  micro_batch_size: 2
"""


def pytest_configure() -> None:
    """Lets no process of the tests take a core from another one the moment a message arrives.

    A collective of four ranks on two cores is fifty such messages: it takes a fifth of the time.
    Whatever is started from here inherits it. Where it is forbidden, tests only take longer.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first: one that is begun last would keep one core busy.

    `slow` says how many seconds a test takes, ten by default; where it is given to a whole file,
    its first argument is the time of each test.
    """
    seconds = Counter[str]()
    for item in items:
        mark = item.get_closest_marker("slow")
        seconds[item.location[0]] += mark.args[0] if mark and mark.args else 10 if mark else 0
    items.sort(key=lambda item: -seconds[item.location[0]])  # stable: files stay together


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shard folders `train`, `valid` and `short`."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_run(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Function(output name, **sections) -> config of a tiny run."""

    def make(output: str = "run", **sections: Any) -> RunConfig:
        return tiny_run(corpus, tmp_path / output, **sections)

    return make


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A small run, which tests change by overrides."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path
