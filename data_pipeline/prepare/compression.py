"""Input files as they were before they were compressed; each flaw named with its file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.errors import InputError

COMPRESSIONS = ("", ".gz", ".zst")
"""Endings by which plain and compressed files are told apart."""
UNREAD_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".br", ".lzma", ".Z", ".zip", ".7z")
COMPRESSED_BYTES = 1 << 10
"""Read at once where the library hands out all that they hold: of zstd no more than 32 MB."""


def compressed(*endings: str) -> tuple[str, ...]:
    """Returns endings of file names, each plain and compressed."""
    return tuple(ending + how for ending in endings for how in COMPRESSIONS)


def plain_chunks(path: Path, raw: IO[bytes], size: int) -> Iterator[bytes]:
    """Yields the contents of a plain, gzip or zstd file.

    Args:
        path: the file, whose name tells how it is compressed.
        raw: the same, opened.
        size: about how many bytes come at a time.

    Raises:
        InputError: the file is damaged.
    """
    try:
        ending = path.suffix.lower()
        if ending == ".gz":
            with gzip.GzipFile(fileobj=raw) as plain:
                # A piece at a time: what 1 MB of gzip holds may not fit into memory.
                while chunk := plain.read(size):
                    yield chunk
        elif ending == ".zst":
            yield from _zstd_chunks(path, raw, size)
        else:
            while chunk := raw.read(size):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _zstd_chunks(path: Path, raw: IO[bytes], size: int) -> Iterator[bytes]:
    import zstandard  # only needed for .zst inputs

    # Frame by frame: the library's stream reader takes a file cut inside a frame for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside, chunk = False, raw.read(COMPRESSED_BYTES)
    waiting: list[bytes] = []
    num_bytes = 0
    try:
        while chunk:
            inside = True
            waiting.append(frame.decompress(chunk))
            num_bytes += len(waiting[-1])
            if num_bytes >= size:
                yield b"".join(waiting)
                waiting, num_bytes = [], 0
            chunk = b""
            if frame.eof:
                inside, chunk = False, frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
            chunk = chunk or raw.read(COMPRESSED_BYTES)
    except zstandard.ZstdError as error:
        raise _damaged(path, str(error)) from error
    if waiting:
        yield b"".join(waiting)
    if inside:
        raise _damaged(path, "the file ends inside a compressed frame")


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: damaged compressed file ({' '.join(reason.split())}); fetch or compress it again"
    )
