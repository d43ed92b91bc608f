"""Whatever is killed, whenever, the newest complete checkpoint is found."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.output_folder import sync_path
from megadlcm.run_folder import checkpoints, files
from megadlcm.run_folder.checkpoints import (
    commit,
    find_problem,
    list_steps,
    newest_verified,
    prune,
    remove_unfinished,
    verify_all,
)


class KilledError(Exception):
    """Stands for a process that ends here."""


def save(root: Path, step: int) -> Path:
    contents = f"content of step {step}".encode()
    return commit(
        root,
        step,
        {
            "model.safetensors": lambda path: path.write_bytes(contents) and None,
            "state.json": lambda path: path.write_text(str(step)) and None,
        },
    )


def newest_step(root: Path) -> int | None:
    newest = newest_verified(root)
    return None if newest is None else newest.step


def test_a_committed_checkpoint_is_found_and_latest_names_it(tmp_path: Path) -> None:
    assert newest_verified(tmp_path) is None
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    newest = newest_verified(tmp_path)
    assert newest is not None and newest.path == folder and newest.step == 10
    assert (tmp_path / "latest").read_text() == "step_0000000010\n"


def test_a_save_killed_at_any_point_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = sync_path
    outcomes = set()
    for survived in range(20):
        root = tmp_path / str(survived)
        save(root, 1)
        calls = 0

        def fsync(path: Path, survived: int = survived) -> None:
            nonlocal calls
            if calls == survived:
                raise KilledError
            calls += 1
            exact(path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "sync_path", fsync)
            try:
                save(root, 2)
                finished = True
            except KilledError:
                finished = False
        step = newest_step(root)
        assert step in (1, 2)
        outcomes.add((step, finished))
        remove_unfinished(root)
        save(root, 3)  # the next start saves on, whatever lies about
        assert newest_step(root) == 3
    assert outcomes == {(1, False), (2, False), (2, True)}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "never committed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "5 bytes"),
        (lambda folder: (folder / "state.json").write_text("x"), "SHA-256"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, problem: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert callable(damage)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert newest_step(tmp_path) == 1
    assert str(newest) in caplog.text and problem in caplog.text
    assert [bool(checkpoint.problem) for checkpoint in verify_all(tmp_path)] == [True, False]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("refused", ["model.safetensors", "state.json"])
def test_a_save_that_the_disk_does_not_take_is_removed(
    tmp_path: Path, number: int, refused: str
) -> None:
    save(tmp_path, 1)

    def write(path: Path) -> None:
        path.write_text("half of")
        if path.name == refused:
            raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError) as failed:
        commit(tmp_path, 2, dict.fromkeys(("model.safetensors", "state.json"), write), 12_345)
    line = str(failed.value)
    assert f"step_0000000002: cannot be written ({os.strerror(number)}); 12,345 bytes " in line
    assert f" bytes free in {tmp_path}; " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000000001"]
    assert newest_step(tmp_path) == 1


def test_resuming_does_not_trust_latest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text("step_0000000099\n")
    assert newest_step(tmp_path) == 2


def test_a_step_that_was_passed_over_can_be_saved_again(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    (folder / "state.json").write_text("x")
    assert newest_step(tmp_path) is None
    assert save(tmp_path, 2) == folder
    assert newest_step(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [files.step_name(2)]


def test_pruning_keeps_the_newest_and_zero_keeps_all(tmp_path: Path) -> None:
    folders = [save(tmp_path, step) for step in range(1, 6)]
    prune(tmp_path, 0, folders[-1])
    assert len(list_steps(tmp_path)) == 5
    prune(tmp_path, 2, folders[-1])
    assert [step for step, _ in list_steps(tmp_path)] == [5, 4]


def test_pruning_never_removes_the_newest_good_checkpoint(tmp_path: Path) -> None:
    folders = [save(tmp_path, step) for step in range(1, 4)]
    for folder in folders[1:]:
        (folder / "state.json").write_text("x")
    prune(tmp_path, 1, folders[0])
    assert newest_step(tmp_path) == 1


def test_a_file_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_0000000009.tmp").mkdir()
    (tmp_path / "step_12").mkdir()
    assert [step for step, _ in list_steps(tmp_path)] == [1]
    assert find_problem(tmp_path / "step_12")
