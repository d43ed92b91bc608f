"""Locks between processes and machines: a killed process holds none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from data_pipeline.errors import StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FileLock:
    """A lock on a file that is made for it; held until close(), a context manager."""

    def __init__(self, descriptor: int) -> None:
        """Wraps a descriptor that holds the lock."""
        self._descriptor = descriptor

    def __enter__(self) -> FileLock:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back."""
        self.close()

    def close(self) -> None:
        """Gives the lock back; once is enough."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def lock_file(path: Path, *, wait: bool, shared: bool = False) -> FileLock | None:
    """Locks a file, which is made where there is none.

    Args:
        path: the file, in a folder that exists.
        wait: whether to wait for whoever holds the lock.
        shared: whether others may hold it, too, that ask for it shared.

    Returns:
        The lock; None where another process holds it and `wait` is False.

    Raises:
        FileNotFoundError: no such folder.
        StorageError: the file system knows no locks.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind)
            if _is_at(descriptor, path):
                return FileLock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise StorageError(
                    f"{path}: this file system knows no locks ({error.strerror}), which keep two "
                    "processes from writing the same shard; write to one that does, or mount it "
                    "with them (Lustre: -o flock)"
                ) from error
            raise
        os.close(descriptor)  # who held it removed the file: the lock on it binds nobody


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
