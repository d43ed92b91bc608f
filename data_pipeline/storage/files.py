"""Where shard folders lie, and how patiently they are read: paths here, URLs in remote.py.

A read that fails for a while is tried again with growing pauses, then ends in a StorageError that
names the file. A file that is not there is no such failure: it is reported at once.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from data_pipeline.errors import InputError, StorageError

logger = logging.getLogger(__name__)

Location = str | Path
Result = TypeVar("Result")

LONGEST_WAIT_SECONDS = 30.0
_SAYS_SO_AT_ONCE = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
    *(InputError, StorageError),  # what `read` itself has found out
)


@dataclass(frozen=True)
class StorageOptions:
    """How a folder is read."""

    attempts: int = 5
    """Times a failing read is tried before it is given up; >= 1."""
    wait_seconds: float = 0.5
    """Pause after the first failure; it doubles after each, up to LONGEST_WAIT_SECONDS."""
    cache_dir: str | None = None
    """Local folder for copies of remote shards; needed to read shards by URL."""
    cache_bytes: int = 100_000_000_000
    """Most bytes of copies kept there, by all processes of the machine together."""


class StoredFile(Protocol):
    """An open shard; closed when nothing refers to it."""

    def pread(self, size: int, offset: int) -> bytes:
        """Returns `size` bytes from `offset`, fewer only where the file ends; any thread."""
        ...


class Storage(Protocol):
    """A shard folder to read from; any thread.

    Methods that take a name raise FileNotFoundError where there is no such file, and StorageError
    where the storage goes on failing.
    """

    @property
    def location(self) -> str:
        """The folder or URL."""
        ...

    def path(self, name: str) -> str:
        """Returns what a file is called in messages."""
        ...

    def exists(self) -> bool:
        """Whether the folder is there."""
        ...

    def names(self) -> list[str]:
        """Returns the names of the files of the folder, sorted."""
        ...

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """Returns a whole small file."""
        ...

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens a shard; a copy is made and compared with size and digest where it is remote."""
        ...

    def distrust(self, name: str) -> bool:
        """Forgets a copy of a shard; whether there was one, so that another read may differ."""
        ...


def open_storage(location: Location, options: StorageOptions | None = None) -> Storage:
    """Returns the storage of a folder or URL; looks at nothing yet.

    Raises:
        InputError: a URL of a kind that is not known or not installed.
    """
    options = options or StorageOptions()
    text = str(location)
    if "://" in text and not text.startswith("file://"):
        from data_pipeline.storage.remote_folder import RemoteFolder

        return RemoteFolder(text, options)
    return LocalFolder(text.removeprefix("file://"), options)


def patiently(
    read: Callable[[], Result],
    what: str,
    options: StorageOptions,
    transient: tuple[type[BaseException], ...] = (OSError,),
) -> Result:
    """Returns what `read` returns, trying again after failures that may pass.

    Args:
        read: reads something; must not change anything.
        what: the file, for messages.
        options: number of attempts and pauses.
        transient: failures worth another attempt; no such file and no permission never are.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: at once.
        InputError: permission denied, or raised by `read` itself.
        StorageError: every attempt failed, or raised by `read` itself.
    """
    wait = options.wait_seconds
    for attempt in range(1, options.attempts + 1):
        try:
            return read()
        except _SAYS_SO_AT_ONCE:
            raise
        except PermissionError as error:
            raise InputError(f"{what}: cannot be read (permission denied); change it") from error
        except transient as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if attempt == options.attempts:
                raise StorageError(
                    f"{what}: cannot be read after {attempt} attempts ({reason}); "
                    "check the storage and start again"
                ) from error
            logger.warning(
                "%s: attempt %d failed (%s), again in %.1f s", what, attempt, reason, wait
            )
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("no attempt was made")


class LocalFile:
    """A file of this machine or of a file system that is mounted on it."""

    def __init__(self, path: str, options: StorageOptions) -> None:
        """Opens it; raises FileNotFoundError and others as `patiently` does."""
        self._path, self._options = path, options
        self._descriptor = -1
        self._descriptor = patiently(lambda: os.open(path, os.O_RDONLY), path, options)

    def __del__(self) -> None:
        """Closes the file: whoever still reads it holds a reference."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def pread(self, size: int, offset: int) -> bytes:
        """Returns `size` bytes from `offset`, fewer only where the file ends."""
        try:
            contents = os.pread(self._descriptor, size, offset)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            contents = b""
        if len(contents) == size:
            return contents
        return self._pread_patiently(size, offset)

    def _pread_patiently(self, size: int, offset: int) -> bytes:
        """Puts short reads together, and tries failing ones again."""
        parts: list[bytes] = []
        missing = size
        while missing:
            at = offset + size - missing
            part = patiently(
                lambda at=at, missing=missing: os.pread(self._descriptor, missing, at),  # type: ignore[misc]
                self._path,
                self._options,
            )
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class LocalFolder:
    """A shard folder on a path."""

    def __init__(self, folder: str, options: StorageOptions) -> None:
        """Keeps the path."""
        self._folder, self._options = Path(folder), options

    @property
    def location(self) -> str:
        """The folder."""
        return str(self._folder)

    def path(self, name: str) -> str:
        """Returns the path of a file."""
        return str(self._folder / name)

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self._patiently(self._folder.exists, "")

    def names(self) -> list[str]:
        """Returns the names of the files of the folder, sorted."""
        return sorted(self._patiently(lambda: os.listdir(self._folder), ""))

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""
        return self._patiently(lambda: os.stat(self._folder / name).st_size, name)

    def read_bytes(self, name: str) -> bytes:
        """Returns a whole file."""
        return self._patiently((self._folder / name).read_bytes, name)

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens a shard where it lies; its bytes are checked as they are read."""
        return LocalFile(self.path(name), self._options)

    def distrust(self, name: str) -> bool:
        """Returns False: there is no copy."""
        return False

    def _patiently(self, read: Callable[[], Result], name: str) -> Result:
        return patiently(read, self.path(name), self._options)
