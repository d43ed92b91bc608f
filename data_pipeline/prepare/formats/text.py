"""Files that are documents: texts, and the files of a source tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from data_pipeline.errors import InputError
from data_pipeline.prepare.compression import plain_chunks
from data_pipeline.prepare.formats.fields import BOM, bad_utf8, check_size, storable
from data_pipeline.prepare.formats.format import BINARY, Piece, TextDocument


def cut_text(
    path: Path, raw: IO[bytes], skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yields the file as one record; InputError where it is too large for one."""
    # A file is one record: behind it there is nothing to go on with.
    if skip == 0:
        yield 0, _whole(path, plain_chunks(path, raw, piece_bytes)), 1


def cut_tree_file(
    path: Path, raw: IO[bytes], skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yields the file as it is stored; of a binary one no more than what tells it."""
    if skip == 0:
        first = raw.read(piece_bytes)
        if b"\0" in first:  # weights and images of gigabytes are not read to be left out
            yield 0, b"\0", 1
            return
        chunks = iter(lambda: raw.read(piece_bytes), b"")
        yield 0, _whole(path, chain([first], chunks)), 1


def _whole(path: Path, chunks: Iterable[bytes]) -> bytes:
    read: list[bytes] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        check_size(size, str(path))
        read.append(chunk)
    return b"".join(read)


def text_document(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument]]:
    """Yields the document; InputError where it is not UTF-8, or binary."""
    contents, path = piece.contents.removeprefix(BOM), piece.file.path
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        # An editor finds a line, not a byte of the file.
        line = contents.count(b"\n", 0, error.start) + 1
        raise bad_utf8(f"{path}:{line}", error.start) from error
    if "\0" in text:  # UTF-16 of English is UTF-8, too: every other byte is null
        raise InputError(
            f"{path}: character {text.index(chr(0))} is null, which is in no text; convert the "
            "file to UTF-8 with iconv, or leave it out if it is binary"
        )
    name = piece.file.relative
    yield 0, storable(TextDocument(name, domain, name, text, len(contents), f"{path}:1"))


def tree_document(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument | str]]:
    """Yields a source file as one document, or that it is binary."""
    contents = piece.contents.removeprefix(BOM)
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-8 as well, and in no source file
        yield 0, BINARY
        return
    file, size = piece.file, len(contents)
    document = TextDocument(file.relative, domain, file.tree, text, size, str(file.path))
    yield 0, storable(document)
