"""A tiny corpus for all tests of training, and configs that train on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadlcm.config import RunConfig
from tests.tiny_runs import tiny_run, write_corpus


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
