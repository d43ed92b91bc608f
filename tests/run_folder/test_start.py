"""What stands in the way of a run is found before its first step, and nothing is made for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig, load_config
from megadlcm.run_folder.start import check_run_folder, is_run_folder, prepare_run_folder

MakeRun = Callable[..., RunConfig]
FOLDERS = ("checkpoints", "logs", "samples", "skipped", "tensorboard")
FILES = ("metrics.jsonl", "metrics.abandoned.jsonl", "events.jsonl")


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        check_run_folder(folder)
    assert refused.value.key == "output_dir"
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_resolved_config_is_kept_and_loads_as_the_same_run(make_run: MakeRun) -> None:
    config = make_run(seed=3, optimizer={"betas": [0.8, 0.9]})
    prepare_run_folder(config)
    assert load_config(Path(config.output_dir) / "config.yaml") == config


@pytest.mark.parametrize("filled", [False, True])
def test_what_is_missing_and_what_is_whole_pass_and_stay(tmp_path: Path, filled: bool) -> None:
    for name in FOLDERS if filled else ():
        (tmp_path / name).mkdir()
    for name in FILES if filled else ():
        (tmp_path / name).write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    check_run_folder(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert all((tmp_path / name).read_text() == "{}\n" for name in FILES if filled)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("in_the_way", ["file", "link to nothing"])
def test_what_must_be_a_folder(tmp_path: Path, name: str, in_the_way: str) -> None:
    path = tmp_path / name
    path.touch() if in_the_way == "file" else path.symlink_to("nothing")
    line = refusal(tmp_path)
    assert f"output_dir = {path}: must be a folder that can be written to" in line
    assert "remove it, or choose another output_dir" in line


@pytest.mark.parametrize("name", [*FILES, "config.yaml"])
def test_what_must_be_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    line = refusal(tmp_path)
    assert f"output_dir = {tmp_path / name}: must be a file" in line
    assert "remove it, or choose another output_dir" in line


def test_a_pipe_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl: must be a file" in refusal(tmp_path)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Function that makes a folder or a file read-only, for root as well."""
    mounted: list[Path] = []

    def protect(path: Path) -> None:
        if os.geteuid() != 0:
            path.chmod(0o555 if path.is_dir() else 0o444)
            return
        for options in (["--bind", str(path)], ["-o", "remount,ro,bind"]):
            done = subprocess.run(["mount", *options, str(path)], check=False, capture_output=True)
            if done.returncode:
                pytest.skip("root without mounts may write everywhere; run the tests as a user")
            mounted[:] = [path]

    yield protect
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", ["samples", "checkpoints", "metrics.jsonl"])
def test_what_may_only_be_read(
    tmp_path: Path, read_only: Callable[[Path], None], name: str
) -> None:
    path = tmp_path / name
    path.touch() if "." in name else path.mkdir()
    check_run_folder(tmp_path)  # as it is it may be written
    read_only(path)
    line = refusal(tmp_path)
    assert f"output_dir = {path}: must be a " in line
    assert "Read-only file system" in line or "Permission denied" in line


def test_what_a_run_leaves_behind_is_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "owner.json").touch()  # of a run that was killed in its first seconds
    assert is_run_folder(tmp_path)
    (tmp_path / "letters").mkdir()
    assert not is_run_folder(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert is_run_folder(tmp_path)
