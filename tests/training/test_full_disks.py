"""A disk that takes no more ends a run with one line and 1; what a sample text needs, never."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megadlcm.config import RunConfig
from megadlcm.engine.state import TrainState
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import logs, pretrain
from megadlcm.training.tensorboard import TensorBoard
from megadlcm.training.trainer import Trainer
from tests.support.checkpoints import problems
from tests.support.distributed import free_port, rank_environment
from tests.support.full_disks import fill, largest_file, small_disk
from tests.support.tiny_runs import tiny_run
from tests.support.train_processes import START_SECONDS, start_command, write_run_file

MakeRun = Callable[..., RunConfig]
RunFails = Callable[[RunConfig], str]
FREE = r"[\d,]+ bytes free in "


@pytest.fixture
def run_fails(capfd: pytest.CaptureFixture[str]) -> RunFails:
    """Function(config) -> the line that is all that a run says when it ends with 1."""

    def fails(config: RunConfig) -> str:
        capfd.readouterr()
        assert pretrain.run(config) == 1
        line = capfd.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        return line

    return fails


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; the tiny run's checkpoint has 300 kB."""
    with small_disk(tmp_path / "disk", 1 << 20) as folder:
        yield folder


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_save_on_a_full_disk_leaves_the_newest_checkpoint(
    corpus: Path, disk: Path, run_fails: RunFails
) -> None:
    """Step 2 fits, step 4 does not; with room the same start goes on."""
    folder = disk / "run"
    sections = {"logging": {"tensorboard": False}, "checkpoint": {"max_failures": 1}}
    config = tiny_run(corpus, folder, **sections)
    filler = fill(disk, 600_000)
    line = run_fails(config)
    needed = r"\(No space left on device\); 3\d\d,\d+ bytes needed"
    place = rf"{folder}/checkpoints"
    assert re.search(rf"{place}/step_0000000004\S+: \D+ {needed}, {FREE}{place};", line)
    assert checkpoint_names(folder) == ["latest", "step_0000000002"]
    assert problems(folder) == {2: ""}
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert "ERROR" in log and "Traceback" not in log
    assert [row["step"] for row in read_rows(folder)] == [1, 2, 3, 4]
    filler.unlink()
    assert pretrain.run(tiny_run(corpus, folder, checkpoint={"keep": 1})) == 0
    assert [row["step"] for row in read_rows(folder) if "loss" in row] == list(range(1, 9))


@pytest.mark.slow
def test_of_two_processes_both_say_why_nothing_was_saved(corpus: Path, disk: Path) -> None:
    sections = {
        "logging": {"tensorboard": False},
        "parallel": {"collective_timeout_seconds": 5},
        "checkpoint": {"max_failures": 1},
    }
    file = write_run_file(disk / "run.yaml", corpus, disk / "run", **sections)
    fill(disk, 200_000)
    port = free_port()
    ranks = [start_command("train", file, **rank_environment(rank, 2, port)) for rank in range(2)]
    lines = [process.communicate(timeout=START_SECONDS)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert [line.count("\n") for line in lines] == [1, 1], lines
    for line in lines:
        assert "step_0000000002" in line and "cannot be written (No space left on device)" in line
    assert checkpoint_names(disk / "run") == []


def test_a_start_on_a_full_disk(corpus: Path, disk: Path, run_fails: RunFails) -> None:
    fill(disk, 0)
    line = run_fails(tiny_run(corpus, disk / "run"))
    assert re.search(rf"{disk}/run/\S+: cannot be written \(No space left on device\); ", line)
    assert f" 0 bytes free in {disk}/run" in line
    assert not (disk / "run" / "owner.json").exists()


@pytest.mark.parametrize(
    ("limit", "refused", "needed"),
    [
        pytest.param(20_000, r"checkpoints/step_0000000002\S*", "", id="save"),
        pytest.param(1_300, "metrics.jsonl", r"[\d,]+ bytes needed, ", id="metrics"),
    ],
)
def test_files_that_grow_too_large_for_the_process(
    make_run: MakeRun, run_fails: RunFails, limit: int, refused: str, needed: str
) -> None:
    config = make_run(logging={"tensorboard": False}, checkpoint={"max_failures": 1})
    folder = Path(config.output_dir)
    # a log this long would come first
    folder.mkdir()
    with largest_file(limit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs._LogFile, "emit", lambda *_: None)
        patch.setattr("megadlcm.run_folder.start.dump_config", lambda _: "")
        line = run_fails(config)
    assert re.search(
        rf"{folder}/{refused}: cannot be written \(File too large\); {needed}{FREE}{folder}", line
    )


def test_a_log_that_cannot_be_written_ends_the_run(make_run: MakeRun, run_fails: RunFails) -> None:
    config = make_run()
    log = Path(config.output_dir) / "logs" / "rank_0000.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    line = run_fails(config)
    assert f"{log}: cannot be written (No space left on device); " in line
    assert not (log.parents[1] / "checkpoints").exists()


def test_events_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    """The thread that writes them says nothing by itself."""
    board = TensorBoard(tmp_path, 1)
    message = rf"{tmp_path}\S*: cannot be written \(File too large\)"
    with pytest.raises(Exception, match=message), largest_file(200):
        for step in range(1000):
            board.write({"step": step, "loss": 1.0})
        board.flush()
    with pytest.raises(Exception, match=message):
        board.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_of_events_says_nothing_by_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    test_events_that_cannot_be_written_end_the_run(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_sample_text_costs_neither_the_run_nor_its_checkpoint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(training={"train_steps": 2})
    folder = Path(config.output_dir)
    fit = Trainer.fit

    def fit_where_samples_are_in_the_way(trainer: Trainer) -> TrainState:
        (folder / "samples").touch()  # after the look at the start
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", fit_where_samples_are_in_the_way)
    assert pretrain.run(config) == 0
    assert checkpoint_names(folder) == ["latest", "step_0000000002"]
    assert "eval_loss" in read_rows(folder)[-1]
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert f"WARNING megadlcm.training.trainer: no sample text: {folder}/samples" in log


def test_what_cannot_be_read_is_not_called_unwritable(
    make_run: MakeRun, run_fails: RunFails
) -> None:
    config = make_run(training={"train_steps": 2}, logging={"tensorboard": False})
    assert pretrain.run(config) == 0
    path = Path(config.output_dir) / "metrics.jsonl"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # nothing is mapped where it begins
    line = run_fails(config)
    assert line.startswith(f"error: {path}: cannot be read (Input/output error); ")


@pytest.mark.parametrize(
    ("number", "named", "said"),
    [
        (errno.EIO, "/elsewhere/file", "/elsewhere/file: cannot be read or written"),
        (errno.ENOSPC, "/elsewhere/file", "/elsewhere/file: cannot be written"),
        (errno.ENOSPC, None, "{folder}: cannot be written"),
    ],
)
def test_of_an_error_that_nobody_expects_no_more_is_said_than_is_known(
    make_run: MakeRun,
    run_fails: RunFails,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    named: str | None,
    said: str,
) -> None:
    config = make_run(training={"train_steps": 1}, logging={"tensorboard": False})

    def fail(_: Trainer) -> TrainState:
        raise OSError(number, os.strerror(number), named)

    monkeypatch.setattr(Trainer, "fit", fail)
    assert said.format(folder=config.output_dir) in run_fails(config)


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_files_have_the_modes_of_the_umask(make_run: MakeRun, mask: int) -> None:
    config = make_run(training={"train_steps": 2})
    folder = Path(config.output_dir)
    before = os.umask(mask)
    try:
        assert pretrain.run(config) == 0
    finally:
        os.umask(before)
    paths = [folder, *folder.rglob("*")]
    assert {"rank_00000.safetensors", "manifest.json", "metrics.jsonl", "latest"} <= {
        path.name for path in paths
    }
    modes = {path.relative_to(folder): path.stat().st_mode & 0o777 for path in paths}
    expected = {True: 0o777 & ~mask, False: 0o666 & ~mask}
    assert modes == {path: expected[(folder / path).is_dir()] for path in modes}
