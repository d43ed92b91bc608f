"""Locks keep processes apart, and vanish with whoever held them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.locks import (
    NoLocksError,
    is_locked,
    knows_locks,
    lock_new_file,
    try_lock,
    wait_for_lock,
)
from tests.support.tiny_shards import one_line

HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.storage.locks import wait_for_lock
lock = wait_for_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    """And a living one does."""
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        assert try_lock(path) is None
        assert try_lock(path, shared=True) is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    with try_lock(path):
        assert try_lock(path) is None
    assert try_lock(path) is not None


def test_a_lock_that_fails_after_it_was_taken_is_held_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle of a network file system; else the next reader would wait for ever."""
    path = tmp_path / "a.lock"

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.storage.locks.os.stat", stale)
        with pytest.raises(OSError, match="Stale"):
            wait_for_lock(path)
    assert try_lock(path) is not None


def test_shared_locks_go_together(tmp_path: Path) -> None:
    """But with none that is not shared; closing twice is once."""
    path = tmp_path / "a.lock"
    first, second = (try_lock(path, shared=True) for _ in range(2))
    for lock in (first, second):
        assert try_lock(path) is None
        lock.close()
        lock.close()
    assert try_lock(path) is not None


def test_a_lock_on_a_file_that_was_removed_binds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed while one waited: the file of that name is another one now."""
    path = tmp_path / "a.lock"
    flock, removed = fcntl.flock, [False]

    def remove_once(descriptor: int, kind: int) -> None:
        flock(descriptor, kind)
        if not removed[0]:
            path.unlink()
            removed[0] = True

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with wait_for_lock(path):
        assert removed[0] and path.exists()
        assert try_lock(path) is None


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on without them could mix two processes' shards; other errors stay what they are."""

    def fail(number: int) -> None:
        def flock(*_: int) -> None:
            raise OSError(number, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)

    fail(errno.ENOSYS)
    with pytest.raises(StorageError, match=r"a\.lock: this file system knows no locks") as error:
        try_lock(tmp_path / "a.lock")
    one_line(error)
    fail(errno.EIO)
    with pytest.raises(OSError, match="not implemented"):
        try_lock(tmp_path / "a.lock")
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "absent" / "a.lock")


def test_a_forked_child_keeps_no_lock(tmp_path: Path) -> None:
    """It would hold it for a parent that is gone; and what it closes is not the parent's."""
    path = tmp_path / "a.lock"
    held, done = wait_for_lock(path), os.pipe()
    child = os.fork()
    if child == 0:
        held.close()
        os.write(done[1], b"1" if is_locked(str(path)) else b"0")
        time.sleep(600)
    try:
        assert os.read(done[0], 1) == b"1" and is_locked(str(path))
        held.close()
        assert try_lock(path) is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in done:
            os.close(end)


def test_a_killed_parent_leaves_no_lock_with_its_child(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    program = HOLD.replace('print("held"', "import os; child = os.fork()\nif child: print(child")
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        try:
            deadline = time.monotonic() + 60  # for the child to run what it runs after a fork
            while is_locked(str(path)) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not is_locked(str(path))
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_new_file_is_locked_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gone where it cannot be locked."""
    path = tmp_path / "partial"
    with lock_new_file(str(path)) as lock:
        os.write(lock.descriptor, b"123")
        assert is_locked(str(path)) and try_lock(path) is None
        with pytest.raises(FileExistsError):
            lock_new_file(str(path))
    assert not is_locked(str(path)) and path.read_bytes() == b"123"
    assert not is_locked(str(tmp_path / "absent"))

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(NoLocksError) as error:
        lock_new_file(str(tmp_path / "other"))
    assert error.value.reason == "No locks available" and not (tmp_path / "other").exists()


def test_whether_a_file_system_knows_locks_is_found_out_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert knows_locks(tmp_path)

    def refuse(number: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", fail)

    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        refuse(number)
        assert not knows_locks(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        knows_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []
