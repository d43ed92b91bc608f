"""Whatever is killed, whenever, the folder holds the old checkpoint or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import StorageError
from megadlcm.checkpoint.folder import Checkpoint, candidates
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.checkpoint.verifying import verify
from tests.support.made_checkpoints import make_checkpoint

ATTEMPT = "0123456789abcdef" * 2


class KilledError(BaseException):
    """Stands for a process that ends here."""


@contextlib.contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Ends this process, as it were, instead of its n-th act on a disk; the acts before that."""
    acts: list[str] = []

    def counted(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            if len(acts) >= number:
                raise KilledError
            acts.append(name)
            return act(*arguments, **options)

        return do

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "write", "open"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield acts


def good(root: Path) -> list[int]:
    """Steps of the checkpoints that pass every check, newest first."""
    storage = LocalStorage(root)
    found = []
    for name, each in candidates(storage):
        if isinstance(each, Checkpoint) and not verify(storage, name, threads=1).problem:
            found.append(each.step)
    return found


def until_done(tmp_path: Path, prepare: Callable[[Path], None], act: Callable[[Path], None]) -> Any:
    """Runs an act again and again, killed one act on the disk later each time; what was left."""
    left = []
    for number in range(10_000):
        root = tmp_path / str(number)
        prepare(root)
        try:
            with killed_at(number):
                act(root)
            done = True
        except KilledError:
            done = False
        left.append((good(root), sorted(os.listdir(root)), done))
        # the next start tidies up and saves on, whatever lies about
        assert LocalStorage(root).tidy() == []
        assert not [name for name in os.listdir(root) if name.endswith((".writing", ".deleting"))]
        make_checkpoint(root, 9)
        assert good(root)[0] == 9
        if done:
            return left
    raise AssertionError


def test_a_save_killed_at_any_act_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    left = until_done(
        tmp_path,
        lambda root: make_checkpoint(root, 1) and None,
        lambda root: make_checkpoint(root, 2) and None,
    )
    outcomes = [steps for steps, _, _ in left]
    assert len(outcomes) >= 30
    first = outcomes.index([2, 1])
    assert outcomes == [[1]] * first + [[2, 1]] * (len(outcomes) - first)
    assert 0 < first < len(outcomes) - 1 and left[-1][2]


def test_a_step_saved_again_costs_at_most_itself(tmp_path: Path) -> None:
    """It was damaged and passed over; between two renames no folder has its name."""

    def prepare(root: Path) -> None:
        make_checkpoint(root, 1)
        (make_checkpoint(root, 2) / "state.json").write_bytes(b"x")

    left = until_done(tmp_path, prepare, lambda root: make_checkpoint(root, 2) and None)
    outcomes = [steps for steps, _, _ in left]
    assert set(map(tuple, outcomes)) == {(1,), (2, 1)}
    assert outcomes == sorted(outcomes)


def test_a_removal_killed_half_way_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path,
) -> None:
    def prepare(root: Path) -> None:
        make_checkpoint(root, 1)
        make_checkpoint(root, 2)

    left = until_done(
        tmp_path, prepare, lambda root: LocalStorage(root).remove("step_0000000001", ATTEMPT)
    )
    assert [steps for steps, _, _ in left[:2]] == [[2, 1], [2]]
    assert all(steps == [2] for steps, _, _ in left[1:])
    assert left[2][1] == ["latest", f"step_0000000001.{ATTEMPT}.deleting", "step_0000000002"]


def test_latest_names_the_newest_for_people(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    make_checkpoint(tmp_path, 10)
    assert (tmp_path / "latest").read_text() == "step_0000000010\n"


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_stands_in_the_place_of_latest_costs_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_folder: bool
) -> None:
    if is_folder:
        (tmp_path / "latest").mkdir()
    else:
        (tmp_path / "latest").symlink_to("nowhere/at/all")
    with caplog.at_level(logging.WARNING):
        make_checkpoint(tmp_path, 5)
    assert good(tmp_path) == [5]
    assert ("latest: cannot be written" in caplog.text) == is_folder


def test_a_writer_of_another_start_is_left_alone(tmp_path: Path) -> None:
    storage, other = LocalStorage(tmp_path), uuid.uuid4().hex
    storage.begin("step_0000000002", other, 0)
    make_checkpoint(tmp_path, 2)
    file = storage.create("step_0000000002", other, "rank_00000.safetensors")
    file.write(b"late")
    assert good(tmp_path) == [2]
    with pytest.raises(FileExistsError):  # nothing is ever written into a file that is there
        storage.create("step_0000000002", other, "rank_00000.safetensors")
    file.finish()


def litter(root: Path) -> list[str]:
    """What killed starts left, and what looks like it."""
    ours = [f"step_0000000003.{ATTEMPT}.writing", f"step_0000000004.{ATTEMPT}.deleting"]
    for name in ours:
        (root / name).mkdir()
        (root / name / "rank_00000.safetensors").write_bytes(b"half")
    (root / f"step_0000000005.{ATTEMPT}.deleting").symlink_to("step_0000000001")
    (root / f"step_0000000006.{ATTEMPT}.writing").write_text("a file")
    return ours


def test_tidying_removes_what_this_program_left_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    theirs = [
        "step_0000000001.old",
        "step_0000000002.tmp",
        "step_0000000002.backup.writing",
        f"step_0000000002.{ATTEMPT}",
        f"{ATTEMPT}.writing",
        "pins",
        "notes",
    ]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / "step_0000000007.old").symlink_to("nowhere")
    litter(tmp_path)
    assert LocalStorage(tmp_path).tidy() == []
    kept = ["latest", "step_0000000001", "step_0000000007.old", *theirs]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert all((tmp_path / name / "precious").is_file() for name in theirs)
    assert good(tmp_path) == [1]  # what a link led to is there


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES, errno.EIO, errno.ENOTEMPTY])
def test_what_cannot_be_tidied_is_named_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make_checkpoint(tmp_path, 1)
    ours = litter(tmp_path)

    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        said = LocalStorage(tmp_path).tidy()
    assert len(said) == len(ours)
    assert all(os.strerror(number) in line and "\n" not in line for line in said)
    make_checkpoint(tmp_path, 2)
    assert good(tmp_path) == [2, 1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", busy)
        (line,) = LocalStorage(tmp_path).tidy()
    assert "cannot be listed" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("act", ["write", "fsync"])
def test_a_save_that_the_disk_does_not_take_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, number: int
) -> None:
    """Also where it would take it when asked again: bytes are lost by then."""
    make_checkpoint(tmp_path, 1)
    calls = 0
    exact = getattr(os, act)

    def fail_once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(number, os.strerror(number))
        return exact(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StorageError) as failed:
        patch.setattr(os, act, fail_once)
        make_checkpoint(tmp_path, 2)
    assert f"cannot be written ({os.strerror(number)}); " in str(failed.value)
    assert good(tmp_path) == [1]


def test_a_save_without_room_says_so_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"No space left on device.* bytes needed") as failed:
        LocalStorage(tmp_path / "new").begin("step_0000000001", ATTEMPT, 1 << 62)
    assert "step_0000000001" in str(failed.value)
    assert os.listdir(tmp_path / "new") == []


def test_files_are_for_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = make_checkpoint(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 5 and set(modes.values()) == {0o640}
