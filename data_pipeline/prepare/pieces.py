"""Input files to pieces: whole records as they are stored, about a megabyte of them at a time.

Whoever reads pieces decompresses and finds where records end, nothing more: that is quick enough to
feed many processes that do the rest (documents.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data_pipeline.errors import InputError, StorageError
from data_pipeline.prepare.formats.format import BEGINNING, InputFile, Piece, Position
from data_pipeline.prepare.formats.known import format_of
from data_pipeline.small_file import open_ordinary

PIECE_BYTES = 1 << 20
"""A piece of lines or rows is about as large; a longer record is a piece of its own."""


@dataclass
class ReadProgress:
    """How many bytes of input were consumed, as stored (compressed where the file is)."""

    finished_bytes: int = 0
    current: IO[bytes] | None = field(default=None, repr=False)

    @property
    def done_bytes(self) -> int:
        """Those of finished files and of the current one."""
        return self.finished_bytes + (self.current.tell() if self.current else 0)


def read_pieces(
    files: Sequence[InputFile], progress: ReadProgress, start: Position = BEGINNING
) -> Iterator[Piece]:
    """Yields all records of the files from a position on, in order.

    Args:
        files: from find_inputs.
        progress: updated while reading.
        start: where to begin; files before it are not opened.

    Raises:
        InputError: a damaged compressed or Parquet file, or one that cannot be opened.
        StorageError: reading fails.
    """
    number = start.number
    for at, file in enumerate(files):
        # Files before it are not opened, but they count: progress is a share of the whole.
        if at >= start.file:
            # Only the file that reading stopped in begins inside.
            skip = start.record if at == start.file else 0
            with _opened(file.path) as raw:
                progress.current = raw
                cut = format_of(file).cut(file.path, raw, skip, PIECE_BYTES)
                for record, contents, num_records in cut:
                    place = Position(at, record, number)
                    yield Piece(file, place, contents, num_records)
                    number += num_records
                progress.current = None
        progress.finished_bytes += file.num_bytes


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file; what fails in reading it is named."""
    try:
        raw = os.fdopen(open_ordinary(path), "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    with raw:
        try:
            yield raw
        except OSError as error:
            # Not the input's fault: the same bytes may be read at the next start.
            raise StorageError(
                f"{path}: cannot be read ({error.strerror or error}); check the storage and start "
                "again"
            ) from error
