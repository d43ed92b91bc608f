"""Shard folders in object stores and on web servers, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked
from data_pipeline.small_file import check_size, most_bytes
from data_pipeline.storage.cache import ShardCache
from data_pipeline.storage.connection import Connection
from data_pipeline.storage.interface import StorageOptions, StoredFile
from data_pipeline.storage.listing import MOST_LISTING_BYTES, linked_names
from data_pipeline.storage.patience import (
    LEAST_BYTES,
    GaveUpError,
    Pace,
    within_patience,
)
from data_pipeline.storage.retries import with_retries

Result = TypeVar("Result")

CHUNK_BYTES = 8 * 2**20
LISTING_BYTES = 10 * LEAST_BYTES
"""What the listing of a store counts as where its pages are not seen."""


class RemoteFolder:
    """A shard folder behind a URL; any thread, and after a fork."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        """Connects to nothing yet.

        Raises:
            InputError: fsspec does not know the protocol, or lacks a package for it.
        """
        self._connection = Connection(url)
        self._url, self._options = self._connection.url, options
        self._is_web = self._connection.is_web
        self._cache: ShardCache | None = None
        if options.cache_dir:
            # copies stay good under another password
            self._cache = ShardCache(masked(self._url), options.cache_dir, options)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str, StorageOptions]]:
        """Goes to another process as its URL: connections do not travel."""
        return RemoteFolder, (self._url, self._options)

    @property
    def location(self) -> str:
        return self._url

    def path(self, name: str) -> str:
        return self._connection.path(name)

    def exists(self) -> bool:
        """Whether the store knows of the folder; many know only of files in it."""
        try:
            self._retried("", lambda system, path: within_patience(lambda: system.info(path)))
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        return self._retried("", self._linked if self._is_web else _listed)

    def _linked(self, system: Any, path: str) -> list[str]:
        page = self._read_whole(system, path, MOST_LISTING_BYTES)
        if len(page) > MOST_LISTING_BYTES:
            raise StorageError(
                f"{self._url}: its listing goes on after {MOST_LISTING_BYTES:,} bytes, so it is "
                "not that of a shard folder; check the server"
            )
        return linked_names(page, path)

    def size(self, name: str) -> int:

        def read(system: Any, path: str) -> int:
            size = _size(system, path)
            if size is None:
                raise OSError("the store does not tell its size")
            return size

        return self._retried(name, read)

    def read_bytes(self, name: str) -> bytes:

        def read(system: Any, path: str) -> bytes:
            stored, most = _size(system, path), most_bytes(name)
            check_size(self.path(name), stored or 0, most)
            if self._is_web or stored is None:
                contents = self._read_whole(system, path, most if stored is None else stored)
                check_size(self.path(name), len(contents), most)
            else:
                contents = within_patience(lambda: system.cat_file(path), stored)
            # Some servers hang up early without an error, others go on after what they declared.
            _check_arrived(len(contents), stored)
            return contents

        return self._retried(name, read)

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens the local copy of a shard; it is downloaded where there is none.

        Raises:
            FileNotFoundError: no such file.
            DamagedDataError: the store has other bytes than those that were written.
            InputError: data.cache_dir is not set or cannot be used.
            StorageError: the store does not answer, or the disk is full.
        """
        if self._cache is None:
            raise InputError(
                f"data.cache_dir = None, must be set to read shards from {self._url}; name a "
                "folder on a local disk",
                key="data.cache_dir",
            )
        return self._cache.open(name, size, sha256, lambda: self._chunks(name, size))

    def distrust(self, name: str) -> bool:
        """Removes the copy of a shard, so that it is downloaded again; whether there was one."""
        return self._cache is not None and self._cache.forget(name)

    def _retried(self, name: str, read: Callable[[Any, str], Result]) -> Result:
        def attempt() -> Result:
            with self._connection.to(name) as (system, path):
                return read(system, path)

        return with_retries(attempt, self.path(name), self._options, transient=(Exception,))

    def _chunks(self, name: str, size: int) -> Generator[bytes]:
        """Yields the bytes of a file; fails where fewer arrive than the store has."""
        arrived = 0
        with self._connection.to(name) as (system, path):
            with contextlib.closing(self._stream(system, path)) as stream:
                for chunk in stream:
                    arrived += len(chunk)
                    yield chunk
            if arrived < size:
                _check_arrived(arrived, _size(system, path))

    def _read_whole(self, system: Any, path: str, most: int) -> bytes:
        """Returns the bytes of a file; of a longer one a few more than `most`."""
        contents = bytearray()
        with contextlib.closing(self._stream(system, path)) as stream:
            for chunk in stream:
                contents += chunk
                if len(contents) > most:
                    break
        return bytes(contents)

    def _stream(self, system: Any, path: str) -> Generator[bytes]:
        """Yields the bytes of a file as they come; fails where they come too slowly."""
        options: dict[str, Any] = {"cache_type": "none"}
        if self._is_web:
            options["block_size"] = 0  # one request: not every web server knows ranges
        file = within_patience(lambda: system.open(path, "rb", **options))

        def read() -> bytes:
            contents: bytes = file.read(CHUNK_BYTES)
            return contents

        # the web returns what has come, or fails after a silence; others when a chunk is complete
        attempt = read if self._is_web else lambda: within_patience(read, CHUNK_BYTES)
        pace = Pace()
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            try:
                while chunk := pace.next(attempt):
                    yield chunk
            except GaveUpError:
                stack.pop_all()  # to close it would wait for the read
                raise


def _size(system: Any, path: str) -> int | None:
    size: int | None = within_patience(lambda: system.info(path)["size"])
    return size


def _listed(system: Any, path: str) -> list[str]:
    entries = within_patience(lambda: system.ls(path, detail=True), LISTING_BYTES)
    return sorted(
        {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory"}
    )


def _check_arrived(arrived: int, stored: int | None) -> None:
    if stored is not None and arrived != stored:
        raise OSError(f"{arrived} of {stored} bytes arrived")
