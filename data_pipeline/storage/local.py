"""Shard folders on paths: read where they lie, by offset, from any thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_pipeline.small_file import open_ordinary, read_small
from data_pipeline.storage.interface import StorageOptions, StoredFile
from data_pipeline.storage.retries import with_retries

Result = TypeVar("Result")


class LocalFile:
    """A file of this machine or of a file system that is mounted on it."""

    def __init__(self, path: str, options: StorageOptions) -> None:
        """Opens it; raises FileNotFoundError and others as `with_retries` does."""
        self._path, self._options = path, options
        # For __del__, which runs as well where the open below fails.
        self._descriptor = -1
        self._descriptor = with_retries(lambda: open_ordinary(path), path, options)

    def __del__(self) -> None:
        """Closes the file: whoever still reads it holds a reference."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def pread(self, size: int, offset: int) -> bytes:
        """Returns `size` bytes from `offset`, fewer only where the file ends."""
        try:
            contents = os.pread(self._descriptor, size, offset)
        except OSError as error:
            # A mistake of this program; another attempt could read somebody else's file.
            if error.errno == errno.EBADF:
                raise
            contents = b""
        if len(contents) == size:
            return contents
        return self._pread_with_retries(size, offset)

    def _pread_with_retries(self, size: int, offset: int) -> bytes:
        """Puts short reads together, and tries failing ones again."""
        parts: list[bytes] = []
        missing = size
        while missing:
            at = offset + size - missing
            part = with_retries(
                lambda at=at, missing=missing: os.pread(self._descriptor, missing, at),  # type: ignore[misc]
                self._path,
                self._options,
            )
            # The file ends: what is missing is for the caller to judge.
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class LocalFolder:
    """A shard folder on a path."""

    def __init__(self, folder: str, options: StorageOptions) -> None:
        self._folder, self._options = Path(folder), options

    @property
    def location(self) -> str:
        return str(self._folder)

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def exists(self) -> bool:
        return self._retried(self._folder.exists, "")

    def names(self) -> list[str]:
        return sorted(self._retried(lambda: os.listdir(self._folder), ""))

    def size(self, name: str) -> int:
        return self._retried(lambda: os.stat(self._folder / name).st_size, name)

    def read_bytes(self, name: str) -> bytes:
        return self._retried(lambda: read_small(self._folder / name), name)

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens a shard where it lies; its bytes are checked as they are read."""
        return LocalFile(self.path(name), self._options)

    def distrust(self, name: str) -> bool:
        """Returns False: there is no copy."""
        return False

    def _retried(self, read: Callable[[], Result], name: str) -> Result:
        return with_retries(read, self.path(name), self._options)
