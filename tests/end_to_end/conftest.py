"""A tiny corpus and run for commands that are given as a user gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megadlcm.commands.main import main
from tests.support.train_processes import write_run_file


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path) -> Path:
    """File of a tiny run with the run folder `run` beside it."""
    return write_run_file(tmp_path / "run.yaml", corpus, tmp_path / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function(*words) -> the one line that `megadlcm WORDS` says before it exits with 2."""

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        try:
            code: int | str | None = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        line = capsys.readouterr().err
        assert code == 2
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n")
        return line

    return run
