"""Pieces of input to documents, each flaw named with its file and line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.inputs import InputFile
from data_pipeline.prepare.pieces import Piece, ReadProgress, read_pieces

DEFAULT_DOMAIN = "text"
TREE_DOMAIN = "code"
BINARY = "binary"
EMPTY = "empty"


@dataclass(frozen=True)
class TextDocument:
    """A document before it is tokenised."""

    id: str
    domain: str
    source: str
    text: str
    num_bytes: int
    """Bytes of the text in UTF-8."""
    origin: str
    """File and line, for messages."""


def read_documents(
    files: Sequence[InputFile],
    progress: ReadProgress,
    left_out: Counter[str],
    domain: str | None = None,
    skip_empty: bool = False,
) -> Iterator[TextDocument]:
    """Yields the documents of the files in order, holding about a megabyte of them.

    Args:
        files: from find_inputs.
        progress: updated while reading.
        left_out: told of what is left out.
        domain: domain of documents that name none; None means "code" in trees, else "text".
        skip_empty: leave out and count documents without text instead of refusing them.

    Raises:
        InputError: bad UTF-8, bad JSON, no text field, a name that cannot be stored, or an empty
            document; names file and line.
    """
    for piece in read_pieces(files, progress):
        for _, found in piece_documents(piece, domain):
            if not isinstance(found, TextDocument):
                left_out[found] += 1
            elif found.text:
                yield found
            elif skip_empty:
                left_out[EMPTY] += 1
            else:
                raise empty_document(found)


def piece_documents(piece: Piece, domain: str | None) -> Iterator[tuple[int, TextDocument | str]]:
    """Yields (number of the record, its document or why there is none); blank lines are nothing.

    Args:
        piece: from read_pieces.
        domain: domain of documents that name none; None means "code" in trees, else "text".

    Raises:
        InputError: bad UTF-8, bad JSON, no text, or a name that cannot be stored.
    """
    number = piece.start.number
    if piece.file.kind == "tree":
        yield number, _tree_document(piece, domain or TREE_DOMAIN) or BINARY
    elif piece.file.kind == "text":
        yield number, _text_document(piece, domain or DEFAULT_DOMAIN)
    else:
        for offset, origin, record in _records(piece):
            name = f"{piece.file.relative}:{piece.start.record + offset + 1}"
            document = _record_document(record, piece.file, domain or DEFAULT_DOMAIN, name, origin)
            yield number + offset, document


def empty_document(document: TextDocument) -> InputError:
    """Returns the error for a document that has nothing to train on."""
    return InputError(
        f"{document.origin}: document {document.id!r} is empty, a document needs at least one "
        "token; remove it or pass --skip-empty"
    )


def describe_left_out(left_out: Counter[str]) -> str:
    """Returns what was left out and how often, for people; empty where nothing was."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))


def _records(piece: Piece) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (records of the piece before, file and place, the record)."""
    path, first = piece.file.path, piece.start.record
    if piece.file.kind == "rows":
        from data_pipeline.prepare.parquet import (
            decode_rows,  # loads pyarrow, which only Parquet needs
        )

        for offset, row in enumerate(decode_rows(piece.contents, path, first)):
            yield offset, f"{path}: row {first + offset + 1}", row
        return
    for offset, line in enumerate(piece.contents.split(b"\n")):
        if line and not line.isspace():  # a blank line holds no record
            origin = f"{path}:{first + offset + 1}"
            yield offset, origin, _parse_record(line, origin)


def _tree_document(piece: Piece, domain: str) -> TextDocument | None:
    """Returns a source file as one document, None when it is binary."""
    try:
        text = piece.contents.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    file = piece.file
    size = len(piece.contents)
    return _checked(TextDocument(file.relative, domain, file.tree, text, size, str(file.path)))


def _text_document(piece: Piece, domain: str) -> TextDocument:
    contents, path = piece.contents, piece.file.path
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise _bad_utf8(f"{path}:{line}", error.start) from error
    name = piece.file.relative
    return _checked(TextDocument(name, domain, name, text, len(contents), f"{path}:1"))


def _record_document(
    record: dict[str, Any], file: InputFile, domain: str, name: str, origin: str
) -> TextDocument:
    text: str = record["text"]
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: text holds half a surrogate pair at character {error.start}, which "
            "UTF-8 cannot store; fix the record"
        ) from error
    document = TextDocument(
        id=_field(record, "id", name),
        domain=_field(record, "domain", domain),
        source=_field(record, "source", file.relative),
        text=text,
        num_bytes=num_bytes,
        origin=origin,
    )
    return _checked(document)


def _checked(document: TextDocument) -> TextDocument:
    """Raises InputError where a shard cannot hold what the record, or its file, is called."""
    for key in ("id", "domain", "source"):
        name: str = getattr(document, key)
        if name.isascii():
            continue
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            origin = document.origin.encode("utf-8", "backslashreplace").decode("utf-8")
            raise InputError(
                f"{origin}: {key} = {name!r}, UTF-8 cannot store its character {error.start}; "
                "fix the record, or rename the file where it is a file's name"
            ) from error
    return document


def _parse_record(line: bytes, origin: str) -> dict[str, Any]:
    """Returns the JSON object of a line; its "text" is a string."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad_utf8(origin, error.start) from error
    except (ValueError, RecursionError) as error:  # ValueError also for too long an integer
        raise InputError(
            f"{origin}: not JSON that can be read ({error}); every line must be an object with a "
            "`text`; fix or remove the line"
        ) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise InputError(f"{origin}: a {kind}, must be an object with a `text`; fix the line")
    if not isinstance(record.get("text"), str):
        raise InputError(
            f"{origin}: text = {str(record.get('text'))[:40]!r}, every record must have a string "
            f"`text` (it has: {', '.join(sorted(record)) or 'nothing'}); add or rename the field"
        )
    return record


def _field(record: dict[str, Any], key: str, default: str) -> str:
    """Returns an optional field as a string; the default where it is absent or null."""
    value = record.get(key)
    return default if value is None or value == "" else str(value)


def _bad_utf8(origin: str, position: int) -> InputError:
    return InputError(
        f"{origin}: byte {position} is not UTF-8, all input must be; convert the file with iconv"
    )
