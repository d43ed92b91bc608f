"""Where checkpoints lie: six verbs, and how a file system does them.

Names are those of checkpoint folders, `step_0000000100`; files of one being written lie in a folder
of its own, told apart by the start of the run that writes it. So nothing is ever written into a
file that is there, and a writer of an earlier start cannot touch what a later one does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import StorageError
from data_pipeline.output_folder import sync_path, write_durably, writing
from megadlcm.checkpoint.format import BLOCK_BYTES
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)

PINS = "pins"
_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 20.0)
"""Seconds between looks for a file that a manifest vouches for: names come late on NFS."""
_NAME = re.compile(files.STEP_PATTERN)
_OURS = re.compile(files.STEP_PATTERN + r"\.[0-9a-f]{32}\.(writing|deleting)")


class NewFile(Protocol):
    """A file being written, which nobody reads before its folder is published."""

    def write(self, block: memoryview | bytes) -> None:
        """Appends bytes."""
        ...

    def finish(self) -> None:
        """Returns when the bytes survive a crash of the machine; once."""
        ...

    def abandon(self) -> None:
        """Gives the file up."""
        ...


class CheckpointStorage(Protocol):
    """Where checkpoints of a run lie."""

    def where(self, name: str = "") -> str:
        """What a checkpoint is called in messages; without a name, the place of all."""
        ...

    def begin(self, name: str, attempt: str, num_bytes: int) -> None:
        """Makes room for a checkpoint that is about to be written."""
        ...

    def create(self, name: str, attempt: str, file: str) -> NewFile:
        """Opens a new file of it."""
        ...

    def publish(self, name: str, attempt: str, manifest: bytes) -> None:
        """Makes a checkpoint exist, whole."""
        ...

    def abandon(self, name: str, attempt: str) -> None:
        """Removes what was written of it, as far as it can be."""
        ...

    def names(self) -> list[str]:
        """Names of what may be a checkpoint, newest first."""
        ...

    def manifest(self, name: str) -> bytes:
        """Reads the manifest; raises FileNotFoundError where there is none."""
        ...

    def size(self, name: str, file: str) -> int:
        """Bytes of a file of a checkpoint."""
        ...

    def read(self, name: str, file: str, start: int, into: memoryview) -> int:
        """Reads bytes of it from `start` on; how many there were."""
        ...

    def pins(self) -> set[str]:
        """Names of checkpoints that retention may not touch."""
        ...

    def set_pins(self, pins: Iterable[str]) -> None:
        """Says which these are."""
        ...

    def remove(self, name: str, attempt: str) -> None:
        """Removes a checkpoint, or what is left of it; it looks like none at once."""
        ...

    def tidy(self) -> list[str]:
        """Removes what killed starts left; what could not be removed, and why."""
        ...


class _LocalFile:
    """A file on a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, block: memoryview | bytes) -> None:
        view = memoryview(block)
        with writing(self.path):
            while len(view):
                view = view[os.write(self._descriptor, view) :]

    def finish(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        with writing(self.path):
            try:
                # an error here is the only word of bytes that are lost; asked again it would not
                # come again
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def abandon(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(OSError):
            self.path.unlink()


class LocalStorage:
    """Checkpoints in a folder of a file system that the processes of the run share.

    Args:
        root: the folder `checkpoints`.
        has_latest: whether `latest` is to name the newest one.
    """

    def __init__(self, root: Path, has_latest: bool = True) -> None:
        self.root, self.has_latest = root, has_latest

    def where(self, name: str = "") -> str:
        return str(self.root / name)

    def _building(self, name: str, attempt: str) -> Path:
        return self.root / f"{name}.{attempt}.writing"

    def begin(self, name: str, attempt: str, num_bytes: int) -> None:
        building = self._building(name, attempt)
        with writing(building, num_bytes):
            self.root.mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(self.root).free
            if room < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(building))
            shutil.rmtree(building, ignore_errors=True)  # of a save of this start that failed
            building.mkdir()
            sync_path(self.root)

    def create(self, name: str, attempt: str, file: str) -> NewFile:
        path = self._building(name, attempt) / file
        with writing(path):
            return _LocalFile(path)

    def publish(self, name: str, attempt: str, manifest: bytes) -> None:
        building, final = self._building(name, attempt), self.root / name
        unfinished = building / f"{files.MANIFEST}.unfinished"
        with writing(final):
            file = _LocalFile(unfinished)
            file.write(manifest)
            file.finish()
            unfinished.rename(building / files.MANIFEST)
            sync_path(building)
            if os.path.lexists(final):
                # damaged, and passed over: a folder that has files cannot be replaced in one call
                self._set_aside(name, attempt)
            building.rename(final)
            sync_path(self.root)
        if self.has_latest:
            self._name_latest(name)

    def _name_latest(self, name: str) -> None:
        try:  # for people: what is in its place, or keeps it from being written, costs no save
            write_durably(self.root / files.LATEST, f"{name}\n".encode())
        except (OSError, StorageError) as error:
            logger.warning("%s: cannot be written (%s)", self.root / files.LATEST, error)

    def abandon(self, name: str, attempt: str) -> None:
        shutil.rmtree(self._building(name, attempt), ignore_errors=True)

    def names(self) -> list[str]:
        try:
            found = os.listdir(self.root)
        except FileNotFoundError:
            return []
        # whatever it is: a link that leads nowhere is named as damage, and not mistaken for nothing
        return sorted((name for name in found if _NAME.fullmatch(name)), reverse=True)

    def manifest(self, name: str) -> bytes:
        return (self.root / name / files.MANIFEST).read_bytes()

    def size(self, name: str, file: str) -> int:
        return (self.root / name / file).stat().st_size

    def read(self, name: str, file: str, start: int, into: memoryview) -> int:
        descriptor = self._open(self.root / name / file)
        try:
            count = 0
            while count < len(into):
                got = os.preadv(descriptor, [into[count:]], start + count)
                if not got:
                    break
                count += got
            return count
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> int:
        for pause in (*_PAUSES, None):
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                if pause is None or not path.parent.is_dir():
                    raise
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # has NFS ask its server anew
            time.sleep(pause)
        raise AssertionError

    def pins(self) -> set[str]:
        try:
            return set((self.root / PINS).read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return set()

    def set_pins(self, pins: Iterable[str]) -> None:
        write_durably(self.root / PINS, pins_text(pins))

    def remove(self, name: str, attempt: str) -> None:
        doomed = self._set_aside(name, attempt)
        _remove_tree(doomed)

    def _set_aside(self, name: str, attempt: str) -> Path:
        doomed = self.root / f"{name}.{attempt}.deleting"
        _remove_tree(doomed)
        (self.root / name).rename(doomed)
        return doomed

    def tidy(self) -> list[str]:
        problems = []
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            return []
        except OSError as error:
            return [f"{self.root}: cannot be listed ({error.strerror})"]
        for name in names:
            if _OURS.fullmatch(name):
                try:
                    _remove_tree(self.root / name)
                except OSError as error:
                    problems.append(f"{self.root / name}: cannot be removed ({error.strerror})")
        return problems


def _remove_tree(path: Path) -> None:
    """Removes a folder, a file or a link, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def pins_text(pins: Iterable[str]) -> bytes:
    """What the file of pins holds."""
    return "".join(f"{name}\n" for name in sorted(pins)).encode()


@contextlib.contextmanager
def abandoned_on_error(file: NewFile) -> Iterator[None]:
    """Gives a file up where something goes wrong."""
    try:
        yield
    except BaseException:
        file.abandon()
        raise


def read_whole(storage: CheckpointStorage, name: str, file: str, num_bytes: int) -> bytes:
    """Reads a file of a checkpoint that its manifest gives this size; it may be cut or longer."""
    content = bytearray(num_bytes)
    got = storage.read(name, file, 0, memoryview(content))
    return bytes(content[:got])


def read_blocks(
    storage: CheckpointStorage, name: str, file: str, num_bytes: int
) -> Iterator[memoryview]:
    """The blocks of a file, each valid until the next one; the last may be short or missing."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for start in range(0, num_bytes, BLOCK_BYTES):
        got = storage.read(name, file, start, buffer[: min(BLOCK_BYTES, num_bytes - start)])
        yield buffer[:got]
