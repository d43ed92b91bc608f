"""Which checkpoints stay, and that the others go without holding anybody up."""

from __future__ import annotations

import logging
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from megadlcm.checkpoint.retention import Retention, doomed, prune
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.config.training import CheckpointConfig
from megadlcm.run_folder.files import step_name
from tests.support.hooked_storage import HookedStorage
from tests.support.made_checkpoints import make_checkpoint

ATTEMPT = "0123456789abcdef" * 2
LATE = 60.0


def steps_left(root: Path) -> list[int]:
    return sorted(int(name[5:]) for name in LocalStorage(root).names())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints 1 to 6."""
    for step in range(1, 7):
        make_checkpoint(tmp_path, step)
    return tmp_path


@pytest.mark.parametrize(
    ("newest_good", "keep", "keep_every", "pins", "left"),
    [
        (6, 0, 0, [], [1, 2, 3, 4, 5, 6]),
        (6, 1, 0, [], [6]),
        (6, 2, 0, [], [5, 6]),
        (6, 9, 0, [], [1, 2, 3, 4, 5, 6]),
        (6, 1, 2, [], [2, 4, 6]),
        (6, 1, 3, [1], [1, 3, 6]),
        (4, 1, 0, [], [4, 5, 6]),  # what is newer may be damaged: it neither counts nor goes
        (4, 2, 0, [1], [1, 3, 4, 5, 6]),
    ],
)
def test_what_stays(
    root: Path, newest_good: int, keep: int, keep_every: int, pins: list[int], left: list[int]
) -> None:
    LocalStorage(root).set_pins(map(step_name, pins))
    prune(LocalStorage(root), ATTEMPT, step_name(newest_good), keep, keep_every)
    assert steps_left(root) == left
    assert not [name for name in os.listdir(root) if "." in name]


def test_a_damaged_one_does_not_count_as_one_that_stays(root: Path) -> None:
    """Else two damaged ones would push out the only one to go back to."""
    (root / step_name(5) / "state.json").unlink()
    (root / step_name(4) / "manifest.json").write_text("{")
    prune(LocalStorage(root), ATTEMPT, step_name(6), 2)
    assert steps_left(root) == [3, 4, 5, 6]
    make_checkpoint(root, 7)
    prune(LocalStorage(root), ATTEMPT, step_name(7), 2)  # damaged ones go with their age
    assert steps_left(root) == [6, 7]


def test_the_newest_good_one_never_goes() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        steps = sorted(draw.sample(range(40), draw.randrange(1, 12)), reverse=True)
        names = [step_name(step) for step in steps]
        newest, pinned = draw.choice(names), set(draw.sample(names, draw.randrange(len(names))))
        whole = set(draw.sample(names, draw.randrange(len(names) + 1))) | {newest}
        keep, every = draw.randrange(4), draw.choice([0, 1, 3, 7])
        gone = doomed(names, newest, keep, every, pinned, whole.__contains__)
        assert gone == sorted(gone) and newest not in gone and not pinned & set(gone)
        assert all(name < newest for name in gone)
        left = [name for name in names if name not in gone and name <= newest and name in whole]
        good = [name for name in names if name <= newest and name in whole]
        assert left[:keep] == good[:keep]
        if keep == 0:
            assert gone == []


def test_what_cannot_be_removed_stays_and_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = os.rename

    def busy(source: Path, target: Path, **others: int) -> None:
        if Path(source).name == step_name(2):
            raise OSError(16, "Device or resource busy", str(source))
        exact(source, target, **others)

    monkeypatch.setattr(os, "rename", busy)
    with caplog.at_level(logging.WARNING):
        retention = Retention(LocalStorage(root), ATTEMPT, CheckpointConfig(keep=1))
        retention.after(step_name(6))
        retention.close()
    assert steps_left(root) == [2, 6]
    (record,) = caplog.records
    assert "checkpoint step_0000000002 cannot be removed: " in record.getMessage()
    assert "busy" in record.getMessage()


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_pins_that_cannot_be_read_keep_everything(
    root: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    if content is None:
        (root / "pins").mkdir()
    else:
        (root / "pins").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        retention = Retention(LocalStorage(root), ATTEMPT, CheckpointConfig(keep=1))
        retention.after(step_name(6))
        retention.close()
    assert steps_left(root) == [1, 2, 3, 4, 5, 6]
    assert "old checkpoints cannot be removed" in caplog.text


def test_a_pin_that_comes_while_others_are_removed_counts(root: Path) -> None:
    def pin(what: str, name: str) -> None:
        if (what, name) == ("remove", step_name(1)):
            LocalStorage(root).set_pins([step_name(3)])

    retention = Retention(HookedStorage(root, pin), ATTEMPT, CheckpointConfig(keep=1))
    retention.after(step_name(6))
    retention.close()
    assert steps_left(root) == [3, 6]


def test_removal_holds_nobody_up_and_one_goes_at_a_time(root: Path) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    threads: set[int] = set()
    removed: list[str] = []

    def wait(what: str, name: str) -> None:
        if what == "remove":
            threads.add(threading.get_ident())
            removed.append(name)
            begun.set()
            assert may_go_on.wait(LATE)

    retention = Retention(HookedStorage(root, wait), ATTEMPT, CheckpointConfig(keep=2))
    retention.after(step_name(4))
    assert begun.wait(LATE)
    retention.after(step_name(5))
    retention.after(step_name(6))  # all of it waits for the first, and nobody for any
    assert removed == [step_name(1)]
    may_go_on.set()
    retention.close()
    assert steps_left(root) == [5, 6] and len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_storage_that_does_not_answer_does_not_hold_up_the_end(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun, stuck = threading.Event(), threading.Event()

    def hang(what: str, _: str) -> None:
        if what == "remove":
            begun.set()
            stuck.wait(LATE)

    retention = Retention(HookedStorage(root, hang), ATTEMPT, CheckpointConfig(keep=1))
    retention.after(step_name(6))
    assert begun.wait(LATE)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        retention.close(seconds=0.01)
    assert time.monotonic() - started < LATE / 2
    assert "the next start goes on" in caplog.text
    work = retention._thread
    assert work is not None and work.daemon  # the interpreter ends without it
    stuck.set()
    work.join(LATE)


def test_a_removal_that_was_cut_is_gone_on_with(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cut(path: Path, *_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(shutil, "rmtree", cut)
        prune(LocalStorage(root), ATTEMPT, step_name(6), 5)
    assert steps_left(root) == [2, 3, 4, 5, 6]
    assert f"{step_name(1)}.{ATTEMPT}.deleting" in os.listdir(root)
    assert LocalStorage(root).tidy() == []
    assert sorted(os.listdir(root)) == ["latest", *map(step_name, range(2, 7))]


def test_without_a_limit_no_thread_is_begun(root: Path) -> None:
    retention = Retention(LocalStorage(root), ATTEMPT, CheckpointConfig(keep=0))
    retention.after(step_name(6))
    retention.close()
    assert retention._thread is None and len(steps_left(root)) == 6
