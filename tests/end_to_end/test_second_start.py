"""A run folder that a run is using is refused to every other start, which leaves no trace."""

from __future__ import annotations

import contextlib
import io
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadlcm.commands.main import main
from megadlcm.run_folder.owner import holding
from tests.support.distributed import run_distributed
from tests.support.train_processes import (
    after_step,
    differences,
    finish,
    start_command,
    stop_at,
    write_run_file,
)

SECTIONS: dict[str, Any] = {"evaluation": {"interval_steps": 2}}

pytestmark = pytest.mark.slow(10)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(file: Path, *overrides: str) -> tuple[int, str]:
    """Exit code of `megadlcm train`, and what it says as an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", str(file), *overrides])
    return code, said.getvalue()


def test_a_second_start_is_refused_before_it_makes_anything(
    run_file: Path, refused: Callable[..., str]
) -> None:
    folder = run_file.with_name("run")
    folder.mkdir()
    with holding(folder):
        assert f"output_dir = {folder}: another start" in refused("train", run_file)
        assert [path.name for path in folder.iterdir()] == ["owner.json"]
    assert main(["train", str(run_file), "training.train_steps=1"]) == 0  # nothing else was wrong


def test_a_second_start_of_two_processes_is_refused_and_the_first_does_not_notice(
    corpus: Path, tmp_path: Path
) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "run"
    files = [
        write_run_file(tmp_path / f"{each.name}.yaml", corpus, each, **SECTIONS)
        for each in (alone, folder)
    ]
    undisturbed, first = (start_command("train", file) for file in files)
    stop_at(first, after_step(3), folder)  # a stopped process is one that is there
    before = contents(folder)
    assert any("step_0000000002" in name for name in before)
    # with another learning rate: a config.yaml written by it would be another one
    for code, line in run_distributed(train, 2, files[1], "optimizer.learning_rate=0.1"):
        assert (code, line.count("\n")) == (2, 1), line
        assert line.startswith(f"error: output_dir = {folder}: another start of the run is using")
        assert f"(host {socket.gethostname()}, pid {first.pid}, since 20" in line
    assert contents(folder) == before
    first.send_signal(signal.SIGCONT)
    finish(first)
    finish(undisturbed)
    assert differences(alone, folder) == []
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in alone.iterdir()} and "owner.json" not in names
