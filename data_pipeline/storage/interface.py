"""What the storage of a shard folder offers, and how it is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Location = str | Path


@dataclass(frozen=True)
class StorageOptions:
    """How a folder is read."""

    attempts: int = 5
    """Times a failing read is tried before it is given up; >= 1."""
    wait_seconds: float = 0.5
    """Pause after the first failure; it doubles after each, up to half a minute."""
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
