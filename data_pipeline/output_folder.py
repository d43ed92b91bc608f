"""What a command leaves behind: a folder that can be written to, and files that are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import InputError, StorageError

# No fault of the input, nor of the program: what a disk, its quota or a limit of the process says.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TO_WRITES_ALONE = (*FULL, errno.EROFS)
DISK_ERRORS = (*_TO_WRITES_ALONE, errno.EIO, errno.ESTALE, errno.ENODEV)


def make_output_folder(folder: Path, key: str, way_out: str = "choose another one") -> None:
    """Makes a folder where there is none; safe to call from several processes.

    Args:
        folder: the folder.
        key: what the user gave it with, for the message.
        way_out: what the user can do where it cannot be, for the message.

    Raises:
        InputError: it is no folder that this process may write to.
        StorageError: the disk is full.
    """
    try:
        # Several ranks may come at once: that it is there by now is no error.
        folder.mkdir(parents=True, exist_ok=True)
        # Tried, not asked for: to root everything seems allowed. No name appears where it can.
        with tempfile.TemporaryFile(dir=folder):
            return
    except FileExistsError:
        reason = "it is a file"
    except OSError as error:
        if error.errno in FULL:
            raise disk_error(folder, error.strerror or "") from error
        reason = error.strerror or str(error)
    raise InputError(
        f"{key} {folder}: must be a folder that can be written to ({reason}); {way_out}",
        key=key.removesuffix(" ="),
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says in one line which file the disk did not give; around reads alone.

    Raises:
        StorageError: the disk fails, which is no statement on what the file holds.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise StorageError(
            f"{_named(path, error)}: cannot be read ({error.strerror or error}); look after the "
            "disk, and start again"
        ) from error


@contextlib.contextmanager
def reading_and_writing(folder: Path) -> Iterator[None]:
    """Says in one line what nobody nearer has: which of the two it was only where that is certain.

    Args:
        folder: what is written to where an error of a write names no file.

    Raises:
        StorageError: a disk fails; an error that tells neither file nor act passes as it is.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _TO_WRITES_ALONE:
            raise disk_error(_named(folder, error), reason) from error
        if error.errno not in DISK_ERRORS or error.filename is None:
            raise
        raise StorageError(
            f"{_named(folder, error)}: cannot be read or written ({reason}); look after the disk, "
            "and start again"
        ) from error


@contextlib.contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Says in one line which file the disk did not take, and what room there is; around writes.

    Args:
        path: what is being written; the error itself may know it better.
        num_bytes: the bytes that it takes, where that is known.

    Raises:
        StorageError: the disk is full or fails, or a quota or a limit is reached.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise disk_error(_named(path, error), error.strerror or str(error), num_bytes) from error


def _named(path: Path, error: OSError) -> Path:
    return path if error.filename is None else Path(os.fsdecode(error.filename))


def disk_error(path: Path, reason: str, num_bytes: int | None = None) -> StorageError:
    """Returns the error for a disk that did not take a file; see `writing`."""
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    room = "" if num_bytes is None else f"{num_bytes:,} bytes needed, "
    with contextlib.suppress(OSError):
        room += f"{shutil.disk_usage(folder).free:,} bytes free in {folder}; "
    return StorageError(
        f"{path}: cannot be written ({reason}); {room}make room there, or look after the disk and "
        "its limits, and start again"
    )


def write_durably(path: Path, contents: bytes) -> None:
    """Writes a file so that it is whole or as it was before, whenever the writer is killed.

    Raises:
        StorageError: see `writing`; the file is as it was before.
    """
    # In the same folder: a rename across file systems would be a copy, which a kill can cut.
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path, len(contents)):
        try:
            with open(unfinished, "wb") as file:
                file.write(contents)
                close_durably(file)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        # The name is given to bytes that are on the disk, and it lasts when its folder is there
        # too.
        os.replace(unfinished, path)
        sync_path(path.parent)


def close_durably(file: BinaryIO) -> None:
    """Closes a file that was written piece by piece when its bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_path(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
