"""Files that are documents: texts, and the files of a source tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.prepare.compression import plain_chunks
from data_pipeline.prepare.formats.fields import bad_utf8, storable
from data_pipeline.prepare.formats.format import BINARY, Piece, TextDocument


def cut_nothing(
    path: Path, raw: IO[bytes], skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yields the file as one record."""
    # A file is one record: behind it there is nothing to go on with.
    if skip == 0:
        yield 0, b"".join(plain_chunks(path, raw, piece_bytes)), 1


def text_document(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument]]:
    """Yields the document; InputError where it is not UTF-8."""
    contents, path = piece.contents, piece.file.path
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        # An editor finds a line, not a byte of the file.
        line = contents.count(b"\n", 0, error.start) + 1
        raise bad_utf8(f"{path}:{line}", error.start) from error
    name = piece.file.relative
    yield 0, storable(TextDocument(name, domain, name, text, len(contents), f"{path}:1"))


def tree_document(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument | str]]:
    """Yields a source file as one document, or that it is binary."""
    try:
        text = piece.contents.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-8 as well, and in no source file
        yield 0, BINARY
        return
    file, size = piece.file, len(piece.contents)
    document = TextDocument(file.relative, domain, file.tree, text, size, str(file.path))
    yield 0, storable(document)
