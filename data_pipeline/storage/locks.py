"""Locks between processes and machines, on files: a killed process holds none.

A lock belongs to an open file, which a forked child inherits: it would go on holding the lock of a
parent that is gone. So a child closes them at once, and who lets a lock go unlocks it before the
file is closed, for a child that was forked just now.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

from data_pipeline.errors import StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class NoLocksError(StorageError):
    """The file system knows no locks; `reason` is what it says."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class FileLock:
    """A lock that this process holds until close(); a context manager."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        """Of the open file, which is read and written through it; -1 when it is closed."""
        _held.add(self)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back; once is enough."""
        if self.descriptor >= 0:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            finally:
                self.forget()

    def forget(self) -> None:
        """Closes the file alone: the lock stays with the processes that also have it open."""
        _held.discard(self)
        os.close(self.descriptor)
        self.descriptor = -1


_held: set[FileLock] = set()


def _forget_inherited() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_inherited)


def knows_locks(folder: Path) -> bool:
    """Whether the file system of a folder knows locks; tried on a file without a name."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    return True


def wait_for_lock(path: Path, *, shared: bool = False) -> FileLock:
    """Locks a file, which is made where there is none, when whoever holds it has let it go.

    Args:
        path: the file, in a folder that exists.
        shared: whether others may hold it, too, that ask for it shared.

    Raises:
        FileNotFoundError: no such folder.
        NoLocksError: the file system knows no locks.
    """
    return _lock(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(path: Path, *, shared: bool = False) -> FileLock | None:
    """Locks a file as `wait_for_lock` does, or returns None where another process holds it."""
    try:
        return _lock(path, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def try_lock_folder(folder: Path) -> FileLock | None:
    """Locks a folder itself, or returns None where another process of this machine holds it.

    The lock stays whatever is removed from the folder; of other machines it often knows nothing.

    Raises:
        NoLocksError: the file system knows no locks of folders; others say so by an OSError.
    """
    lock = FileLock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        _flock(lock, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return lock


def lock_new_file(path: str) -> FileLock:
    """Makes a file and locks it.

    Raises:
        FileExistsError: it is there already.
        NoLocksError: the file system knows no locks.
    """
    # between these two calls another process may take it for abandoned: callers hold a lock of the
    # folder meanwhile
    lock = _opened(path, os.O_CREAT | os.O_EXCL)
    try:
        _flock(lock, path, fcntl.LOCK_EX)
    except BaseException:
        os.unlink(path)
        raise
    return lock


def is_locked(path: str) -> bool:
    """Whether another process, or another part of this one, holds the lock of a file."""
    try:
        lock = _opened(path, 0)
    except FileNotFoundError:
        return False
    try:
        # to ask is to try: what the kernel knows of other holders it tells in no other way
        _flock(lock, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    lock.close()
    return False


def _lock(path: Path, kind: int) -> FileLock:
    while True:
        lock = _opened(path, os.O_CREAT)
        _flock(lock, path, kind)
        try:
            is_there = _is_at(lock, path)
        except BaseException:  # a lock that nobody has would be held until this process ends
            lock.close()
            raise
        if is_there:
            return lock
        lock.close()  # who held it removed the file: the lock on it binds nobody


def _opened(path: str | Path, flags: int) -> FileLock:
    # 0o666 less the umask: other users of a shared folder need the lock too
    return FileLock(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o666))


def _flock(lock: FileLock, path: str | Path, kind: int) -> None:
    """Locks an open file, which is closed where that fails."""
    try:
        fcntl.flock(lock.descriptor, kind)
    except BaseException as error:  # Ctrl-C too: nobody but this function has the open file yet
        lock.forget()
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            reason = error.strerror or str(error)
            raise NoLocksError(
                f"{path}: this file system knows no locks ({reason}), which keep two processes "
                "from writing the same shard; write to one that does, or mount it with them "
                "(Lustre: -o flock)",
                reason=reason,
            ) from error
        raise


def _is_at(lock: FileLock, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(lock.descriptor), there)
