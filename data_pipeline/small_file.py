"""Files that are read whole: ordinary ones of a bounded size, and nothing that never ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipeline.errors import InputError

_MOST_JSON_BYTES = 256 * 2**20
_MOST_BYTES = 4 * 2**30
"""Of arrays: document tables, and the list of shards (104 bytes each)."""


def most_bytes(name: str) -> int:
    """The size above which a file of this name is none of ours."""
    return _MOST_JSON_BYTES if name.endswith(".json") else _MOST_BYTES


def read_small(path: Path) -> bytes:
    """Reads a whole file without waiting for one that a pipe or a device would never end.

    Raises:
        InputError: no ordinary file, or one that is too large to be what its name says.
        OSError: as for any file.
    """
    descriptor = open_ordinary(path)
    with os.fdopen(descriptor, "rb") as file:
        most = most_bytes(path.name)
        check_size(str(path), os.fstat(descriptor).st_size, most)
        # a file that grows meanwhile ends the reading as well
        contents = file.read(most + 1)
    check_size(str(path), len(contents), most)
    return contents


def open_ordinary(path: str | Path) -> int:
    """Opens a file for reading; a descriptor.

    Raises:
        InputError: a pipe, a device, a socket or a folder.
        OSError: as for any file.
    """
    # without a writer a pipe would not even be opened
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(
            f"{path}: is no ordinary file (a pipe, a device or a folder); put the file itself there"
        )
    return descriptor


def check_size(path: str, num_bytes: int, most: int) -> None:
    """Refuses a file that is larger than `most`; raises InputError."""
    if num_bytes > most:
        raise InputError(
            f"{path}: {num_bytes:,} bytes or more, must be at most {most:,}; it is not the file "
            "that was written"
        )
