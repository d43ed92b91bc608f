"""Locks keep processes apart, and vanish with whoever held them."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.locks import lock_file
from tests.support.tiny_shards import one_line

HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.storage.locks import lock_file
lock = lock_file(Path(sys.argv[1]), wait=True)
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    """And a living one does."""
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        assert lock_file(path, wait=False) is None
        assert lock_file(path, wait=False, shared=True) is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    with lock_file(path, wait=False):
        assert lock_file(path, wait=False) is None
    assert lock_file(path, wait=False) is not None


def test_shared_locks_go_together(tmp_path: Path) -> None:
    """But with none that is not shared; closing twice is once."""
    path = tmp_path / "a.lock"
    first, second = (lock_file(path, wait=False, shared=True) for _ in range(2))
    for lock in (first, second):
        assert lock_file(path, wait=False) is None
        lock.close()
        lock.close()
    assert lock_file(path, wait=False) is not None


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
    with lock_file(path, wait=True):
        assert removed[0] and path.exists()
        assert lock_file(path, wait=False) is None


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
        lock_file(tmp_path / "a.lock", wait=False)
    one_line(error)
    fail(errno.EIO)
    with pytest.raises(OSError, match="not implemented"):
        lock_file(tmp_path / "a.lock", wait=False)
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "absent" / "a.lock", wait=False)
