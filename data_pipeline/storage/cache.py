"""Opens shards that lie elsewhere: one process of a machine downloads each, for all of them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.storage.cache_space import (
    DIGEST_CHARACTERS,
    CacheSpace,
    DiskFullError,
    Entry,
    Partial,
)
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.local import LocalFile
from data_pipeline.storage.locks import is_locked
from data_pipeline.storage.retries import with_retries

logger = logging.getLogger(__name__)

Chunks = Callable[[], Generator[bytes]]
"""Starts a download: yields the bytes of a shard in order."""

_HASHED_AT_ONCE = 8 * 2**20
POLL_SECONDS = 0.05
SAYS_WAITING_SECONDS = 30.0


class _WrongBytesError(Exception):
    """A download came to its end and is not the shard that was written."""


class ShardCache:
    """Copies of the shards of one URL, in a folder that other URLs and processes use too."""

    def __init__(self, url: str, cache_dir: str, options: StorageOptions) -> None:
        self._url, self._options = url, options
        folder = hashlib.sha256(url.encode()).hexdigest()[:DIGEST_CHARACTERS]
        self._space = CacheSpace(cache_dir, options.cache_bytes)
        self._folder = self._space.root / folder
        self._damaged: dict[tuple[str, bytes], str] = {}
        self._opened: set[str] = set()
        self._sound: set[tuple[Path, int]] = set()
        """Copies that this process has hashed, as path and inode."""

    def open(self, name: str, size: int, sha256: bytes, chunks: Chunks) -> LocalFile:
        """Opens the copy of a shard, downloading it where there is none.

        Args:
            name: file name of the shard.
            size: its bytes by the index.
            sha256: 32 bytes: its digest by the index.
            chunks: starts a download.

        Raises:
            FileNotFoundError: the store has no such shard.
            DamagedDataError: the store has other bytes than those that were written.
            InputError: the cache cannot be used, or is smaller than the shard.
            StorageError: the store does not answer, or the disk is full.
        """
        path = f"{self._url}/{name}"
        if (name, sha256) in self._damaged:  # found by several downloads: not once more
            raise DamagedDataError(self._damaged[name, sha256])
        # Else it would wait for ever for room that removing copies cannot make.
        if size > self._options.cache_bytes:
            raise InputError(
                f"data.cache_bytes = {self._options.cache_bytes}: {path} alone has {size} bytes; "
                "set data.cache_bytes to many times that",
                key="data.cache_bytes",
            )
        # Named after its bytes: an upload of other ones is another copy, and none is mixed.
        copy = self._folder / f"{name}.{sha256.hex()[:DIGEST_CHARACTERS]}"
        disk_was_full = False
        file = self._open_copy(copy, size, sha256)
        while file is None:
            reserved = self._space.reserve(copy, size, remove_all=disk_was_full)
            if isinstance(reserved, Entry):
                _wait_for(reserved, path)
            elif reserved is not None:
                try:
                    self._download(reserved, name, size, sha256, chunks)
                    with self._space.locked():  # or another process may remove it before it is open
                        reserved.become(copy)
                        self._sound.add((copy, copy.stat().st_ino))  # hashed as it arrived
                        file = self._open_copy(copy, size, sha256)
                except DiskFullError:
                    if disk_was_full:
                        raise
                    # The bound counts our files; others may have filled the disk: once more,
                    # without any copy.
                    disk_was_full = True
                finally:
                    reserved.discard()
            # Somebody else may have downloaded it while this process waited for room.
            file = file or self._open_copy(copy, size, sha256)
        self._opened.add(name)
        return file

    def forget(self, name: str) -> bool:
        """Removes the copies of a shard; whether there was one when this process last read it."""
        # Another thread or process may have removed the copy that the caller has read.
        return self._space.remove(self._folder, name) or name in self._opened

    def _open_copy(self, copy: Path, size: int, sha256: bytes) -> LocalFile | None:
        """Opens a complete copy, which marks it as used."""
        try:
            # A copy cut by a full disk or by hand; `reserve` removes it.
            if (status := copy.stat()).st_size != size:
                return None
            file = LocalFile(str(copy), self._options)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        if (copy, status.st_ino) not in self._sound:
            # Whoever can write to the cache could have made others of the same checksums.
            if _digest(file, size) != sha256:
                logger.warning("%s: not the shard that was written, downloaded again", copy)
                self._space.remove(self._folder, copy.name.rpartition(".")[0])
                return None
            self._sound.add((copy, status.st_ino))
        # A copy that another user made can only be read; it is removed sooner then.
        with contextlib.suppress(OSError):
            now = time.time_ns()  # finer than the clock that a file system uses by itself
            os.utime(copy, ns=(now, now))
        return file

    def _download(
        self, partial: Partial, name: str, size: int, sha256: bytes, chunks: Chunks
    ) -> None:
        """Fills a partial file with the bytes of a shard, as often as it takes."""

        def attempt() -> None:
            # Hashed as it passes: another read of gigabytes would cost as much as the download.
            digest, missing = hashlib.sha256(), size
            partial.rewind()
            with contextlib.closing(chunks()) as download:
                for chunk in download:
                    missing -= len(chunk)
                    # Before it is written: only `size` bytes are reserved.
                    if missing < 0:
                        raise _WrongBytesError(f"longer than the {size} bytes written")
                    digest.update(chunk)
                    partial.write(chunk)
            if missing:
                raise _WrongBytesError(f"{size - missing} bytes long, {size} were written")
            if digest.digest() != sha256:
                raise _WrongBytesError("its SHA-256 is not that of the index")

        path = f"{self._url}/{name}"
        try:
            with_retries(attempt, path, self._options, transient=(Exception,))
        except StorageError as error:
            # A store that fails is no statement on the bytes; one that gives wrong bytes each time
            # is.
            if not isinstance(error.__cause__, _WrongBytesError):
                raise
            problem = (
                f"{path}: damaged, {error.__cause__} (downloaded {self._options.attempts} times); "
                f"see `megadlcm data verify {self._url}` and upload it again"
            )
            self._damaged[name, sha256] = problem
            raise DamagedDataError(problem) from error


def _digest(file: LocalFile, size: int) -> bytes:
    digest = hashlib.sha256()
    for offset in range(0, size, _HASHED_AT_ONCE):
        digest.update(file.pread(min(_HASHED_AT_ONCE, size - offset), offset))
    return digest.digest()


def _wait_for(download: Entry, path: str) -> None:
    """Waits until a download of somebody else is over, however long it takes."""
    began = time.monotonic()
    say_at = began + SAYS_WAITING_SECONDS
    while is_locked(download.path):
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now >= say_at:
            say_at = now + SAYS_WAITING_SECONDS
            logger.warning(
                "%s: waiting for %.0f s until process %s has downloaded %s",
                *(path, now - began, download.process, download.copy),
            )
