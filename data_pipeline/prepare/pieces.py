"""Input files to pieces: whole records as they are stored, about a megabyte of them at a time.

Whoever reads pieces decompresses and finds where records end, nothing more: that is quick enough to
feed many processes that do the rest (documents.py).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from data_pipeline.errors import InputError, StorageError
from data_pipeline.prepare.inputs import InputFile

PIECE_BYTES = 1 << 20
"""A piece of lines or rows is about as large; a longer record is a piece of its own."""

COMPRESSED_BYTES = 1 << 17
"""Read at once where the library hands out all that they hold."""


class Position(NamedTuple):
    """Where reading stands; records are lines (blank ones too), rows or files."""

    file: int = 0
    """Number of the file in its list."""
    record: int = 0
    """Records of that file before this place."""
    number: int = 0
    """Records of all files before this place."""


BEGINNING = Position()


class Piece(NamedTuple):
    """Records that follow each other in a file."""

    file: InputFile
    start: Position
    """Where the first of them stands."""
    contents: bytes
    """A text, JSON lines, or rows in Arrow's stream format."""
    num_records: int

    @property
    def end_number(self) -> int:
        """Number of the record behind it."""
        return self.start.number + self.num_records


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
        if at >= start.file:
            skip = start.record if at == start.file else 0
            with _opened(file.path) as raw:
                progress.current = raw
                for record, contents, num_records in _file_pieces(file, raw, skip):
                    place = Position(at, record, number)
                    yield Piece(file, place, contents, num_records)
                    number += num_records
                progress.current = None
        progress.finished_bytes += file.num_bytes


def _file_pieces(file: InputFile, raw: IO[bytes], skip: int) -> Iterator[tuple[int, bytes, int]]:
    """Yields (records of the file before, contents, number of records) behind `skip` records."""
    if file.kind == "rows":
        from data_pipeline.prepare.parquet import (
            read_rows,  # loads pyarrow, which only Parquet needs
        )

        yield from read_rows(file.path, raw, skip, PIECE_BYTES)
    elif file.kind == "lines":
        record = 0
        for contents in _whole_lines(_chunks(file.path, raw)):
            count = contents.count(b"\n") + (not contents.endswith(b"\n"))
            hidden = min(max(skip - record, 0), count)
            if hidden < count:
                yield record + hidden, _behind_lines(contents, hidden), count - hidden
            record += count
    elif skip == 0:
        yield 0, b"".join(_chunks(file.path, raw)), 1


def _behind_lines(contents: bytes, count: int) -> bytes:
    at = 0
    for _ in range(count):
        at = contents.index(b"\n", at) + 1
    return contents[at:]


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same bytes cut behind newlines; the last may have none."""
    begun: list[bytes] = []
    for chunk in chunks:
        for at in range(0, len(chunk), PIECE_BYTES):  # a chunk may hold far more than was read
            part = chunk[at : at + PIECE_BYTES]
            end = part.rfind(b"\n") + 1
            if end:
                yield b"".join([*begun, part[:end]])
                begun = []
            begun.append(part[end:])
    rest = b"".join(begun)
    if rest:
        yield rest


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file; what fails in reading it is named."""
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    with raw:
        try:
            yield raw
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be read ({error.strerror or error}); check the storage and start "
                "again"
            ) from error


def _chunks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Yields the contents of a plain, gzip or zstd file; raises InputError on a damaged one."""
    try:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as plain:
                while chunk := plain.read(PIECE_BYTES):
                    yield chunk
        elif path.name.endswith(".zst"):
            yield from _zstd_chunks(path, raw)
        else:
            while chunk := raw.read(PIECE_BYTES):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged_file(path, str(error)) from error


def _zstd_chunks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    import zstandard  # only needed for .zst inputs

    # Frame by frame: the library's stream reader takes a file cut inside a frame for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside, chunk = False, raw.read(COMPRESSED_BYTES)
    try:
        while chunk:
            inside = True
            yield frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                inside, chunk = False, frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
            chunk = chunk or raw.read(COMPRESSED_BYTES)
    except zstandard.ZstdError as error:
        raise damaged_file(path, str(error)) from error
    if inside:
        raise damaged_file(path, "the file ends inside a compressed frame")


def damaged_file(path: Path, reason: str) -> InputError:
    """Returns the error for an input file whose bytes do not make sense."""
    return InputError(
        f"{path}: damaged compressed file ({' '.join(reason.split())}); fetch or compress it again"
    )
