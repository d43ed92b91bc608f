"""A storage of checkpoints that calls a test before it does something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megadlcm.checkpoint.storage import LocalStorage, NewFile

Hook = Callable[[str, str], None]
"""Called with what is about to be done, and the name of the file or checkpoint."""


class HookedStorage(LocalStorage):
    """Checkpoints in a folder.

    Args:
        root: the folder `checkpoints`.
        hook: may wait, raise, or end the process.
    """

    def __init__(self, root: Path, hook: Hook) -> None:
        super().__init__(root)
        self.hook = hook

    def begin(self, name: str, attempt: str, num_bytes: int) -> None:
        self.hook("begin", name)
        super().begin(name, attempt, num_bytes)

    def create(self, name: str, attempt: str, file: str) -> NewFile:
        self.hook("create", file)
        return _HookedFile(super().create(name, attempt, file), file, self.hook)

    def publish(self, name: str, attempt: str, manifest: bytes) -> None:
        self.hook("publish", name)
        super().publish(name, attempt, manifest)

    def remove(self, name: str, attempt: str) -> None:
        self.hook("remove", name)
        super().remove(name, attempt)

    def read(self, name: str, file: str, start: int, into: memoryview) -> int:
        self.hook("read", file)
        return super().read(name, file, start, into)


class _HookedFile:
    def __init__(self, file: NewFile, name: str, hook: Hook) -> None:
        self.file, self.name, self.hook = file, name, hook

    def write(self, block: memoryview | bytes) -> None:
        self.hook("write", self.name)
        self.file.write(block)

    def finish(self) -> None:
        self.hook("finish", self.name)
        self.file.finish()

    def abandon(self) -> None:
        self.file.abandon()
