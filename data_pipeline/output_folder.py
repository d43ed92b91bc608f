"""What a command leaves behind: a folder that can be written to, and files that are whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import InputError


def make_output_folder(folder: Path, key: str) -> None:
    """Makes a folder where there is none; safe to call from several processes.

    Args:
        folder: the folder.
        key: what the user gave it with, for the message.

    Raises:
        InputError: it is no folder that this process may write to.
    """
    reason = "Permission denied"
    try:
        # Several ranks may come at once: that it is there by now is no error.
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise InputError(
        f"{key} {folder}: must be a folder that can be written to ({reason}); choose another one",
        key=key.removesuffix(" ="),
    )


def write_durably(path: Path, contents: bytes) -> None:
    """Writes a file so that it is whole or as it was before, whenever the writer is killed."""
    # In the same folder: a rename across file systems would be a copy, which a kill can cut.
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(contents)
        close_durably(file)
    # The name is given to bytes that are on the disk, and it lasts when its folder is there too.
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
