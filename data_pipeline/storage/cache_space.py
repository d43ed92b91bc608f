"""Local copies of remote shards, shared by all processes of a machine and bounded in bytes.

    cache_dir/lock                                               held while files come and go
    cache_dir/<digest of url>/<name>.<digest>                    a copy; mtime is its last use
    cache_dir/<digest of url>/<name>.<digest>.partial-<process>  a download, locked by its maker

A partial file has its full size from the start, so the sum over all files is the bound that is
kept. The lock of a process that was killed is gone with it, and the next one removes its partial.
A copy that is removed while somebody reads it leaves the disk when the last reader closes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import InputError, StorageError
from data_pipeline.storage.locks import NoLocksError, is_locked, lock_new_file, wait_for_lock

DIGEST_CHARACTERS = 16
_FOLDER = re.compile(rf"[0-9a-f]{{{DIGEST_CHARACTERS}}}")
_FILE = re.compile(rf"(?P<copy>.+\.[0-9a-f]{{{DIGEST_CHARACTERS}}})(?:\.partial-(?P<process>\d+))?")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.EOPNOTSUPP, errno.ENOSYS),
)


class DiskFullError(StorageError):
    """The disk of the cache ran full."""


class CacheSpace:
    """The files of a cache folder and the bytes they take; for any number of processes."""

    def __init__(self, cache_dir: str, cache_bytes: int) -> None:
        self.root = Path(cache_dir).absolute()
        self._cache_bytes = cache_bytes

    def reserve(self, copy: Path, size: int, remove_all: bool = False) -> Partial | Entry | None:
        """Makes room for a download, removing the copies least recently used.

        Args:
            copy: what the download will be called.
            size: its bytes.
            remove_all: remove every copy instead: the disk is fuller than cache_bytes tells.

        Returns:
            The partial file; or the download of somebody else that must end first; or None where
            the copy is there by now.

        Raises:
            InputError: the folder cannot be written.
            StorageError: the disk is full without any copy.
        """
        with self.locked():
            with contextlib.suppress(FileNotFoundError):
                if copy.stat().st_size == size:
                    return None
                copy.unlink()  # somebody has cut it
            copies, downloads = self._look()
            for download in downloads:
                if download.copy == str(copy):
                    return download
            # Downloads count with their full size from the start, so that the bound holds at every
            # moment.
            taken = sum(entry.size for entry in (*copies, *downloads))
            while copies and (remove_all or taken + size > self._cache_bytes):
                taken -= _remove(copies.pop(0))
            if taken + size > self._cache_bytes:
                return downloads[0]
            while True:
                try:
                    copy.parent.mkdir(exist_ok=True)
                    return Partial(self, copy, size)
                except OSError as error:
                    if error.errno not in _DISK_FULL:
                        raise
                    if not copies:
                        if not downloads:
                            raise self.disk_full(size) from error
                        return downloads[0]  # will be a copy, which can be removed
                _remove(copies.pop(0))

    def remove(self, folder: Path, name: str) -> bool:
        """Removes the copies of a shard, whatever bytes they should have; whether there was one."""
        with self.locked():
            copies = [
                entry
                for entry in self._look()[0]
                if entry.path.rpartition(".")[0] == str(folder / name)
            ]
            for entry in copies:
                _remove(entry)
        return bool(copies)

    def disk_full(self, size: int) -> StorageError:
        """Returns the error for a disk that has no room for a download."""
        status = os.statvfs(self.root)
        return DiskFullError(
            f"data.cache_dir = {self.root}: disk full, a shard needs {size} bytes, "
            f"{status.f_bavail * status.f_frsize} are free and no copies are left to remove; free "
            "some, or name a folder on a larger disk"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from adding and removing files; makes the folder if need be."""
        where = f"data.cache_dir = {self.root}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with wait_for_lock(self.root / "lock"):
                yield
        except (OSError, NoLocksError) as error:
            reason = error.reason if isinstance(error, NoLocksError) else error.strerror
            if isinstance(error, NoLocksError) or error.errno in _UNUSABLE:
                raise InputError(
                    f"{where}: cannot be used ({reason}); name a folder on a local disk that may "
                    "be written",
                    key="data.cache_dir",
                ) from error
            # Also where somebody deletes the cache meanwhile: no statement on a shard.
            raise StorageError(
                f"{where}: failed ({reason or error}); check the disk and start again"
            ) from error

    def _look(self) -> tuple[list[Entry], list[Entry]]:
        """Returns copies, the least recently used first, and downloads; removes abandoned ones."""
        entries: list[Entry] = []
        for folder in os.scandir(self.root):
            if _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                entries += _files_of(folder.path)
        # By path where times are equal: every process would give up the same one.
        entries.sort(key=lambda entry: (entry.last_use, entry.path))
        downloads = []
        for entry in entries:
            if entry.process:
                if is_locked(entry.path):
                    downloads.append(entry)
                else:
                    _remove(entry)
        return [entry for entry in entries if not entry.process], downloads


class Entry(NamedTuple):
    """One of our files in a cache folder."""

    path: str
    copy: str
    """Path it has when it is complete."""
    process: str
    """Number of the process that downloads it; empty where it is complete."""
    size: int
    last_use: int
    """Time in ns."""


class Partial:
    """A download of this process: its bytes are reserved, and it is locked until discarded."""

    def __init__(self, space: CacheSpace, copy: Path, size: int) -> None:
        """Makes the file; raises OSError where the disk is full."""
        self.path = f"{copy}.partial-{os.getpid()}"
        self._space, self._size, self._is_copy = space, size, False
        self._lock = lock_new_file(self.path)
        try:
            try:
                # A file system without it gets a sparse file: the bound holds, the disk may still
                # run full.
                os.posix_fallocate(self._lock.descriptor, 0, size)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
                os.truncate(self._lock.descriptor, size)
        except BaseException:
            self.discard()
            raise

    def rewind(self) -> None:
        os.lseek(self._lock.descriptor, 0, os.SEEK_SET)

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            try:
                # os.write may write less than it was given.
                view = view[os.write(self._lock.descriptor, view) :]
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise self._space.disk_full(self._size) from error
                raise StorageError(
                    f"{self.path}: cannot be written ({error.strerror}); check data.cache_dir"
                ) from error

    def become(self, copy: Path) -> None:
        """Gives a finished download its name; only while the space is locked."""
        os.replace(self.path, copy)
        self._is_copy = True

    def discard(self) -> None:
        """Removes the file unless it has become a copy, and lets its lock go."""
        # Locked until it is gone, or the next process would take it for an abandoned one.
        if not self._is_copy:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._lock.close()


def _files_of(folder: str) -> Iterator[Entry]:
    for file in os.scandir(folder):
        match = _FILE.fullmatch(file.name)
        if match is None or not file.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(FileNotFoundError):  # a download that has just failed
            status = file.stat(follow_symlinks=False)
            copy = os.path.join(folder, match["copy"])
            process = match["process"] or ""
            yield Entry(file.path, copy, process, status.st_size, status.st_mtime_ns)


def _remove(entry: Entry) -> int:
    """Removes a file; returns the bytes that are free now."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(entry.path)
    return entry.size
