"""JSON lines: an object a line, with a `text` and, if known, id, domain and source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.compression import plain_chunks
from data_pipeline.prepare.formats.fields import (
    BOM,
    bad_utf8,
    check_once,
    check_size,
    record_document,
)
from data_pipeline.prepare.formats.format import Piece, TextDocument


def cut_lines(
    path: Path, raw: IO[bytes], skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yields whole lines, about so many bytes of them at a time; blank ones count.

    Raises:
        InputError: a damaged file, or a line that is too long to be read.
    """
    record = 0

    def check(num_bytes: int) -> None:
        check_size(num_bytes, f"{path}:{record + 1}")

    for contents in _whole_lines(plain_chunks(path, raw, piece_bytes), piece_bytes, check):
        count = contents.count(b"\n") + (not contents.endswith(b"\n"))
        # A restart begins inside of a piece: the lines before are finished already.
        hidden = min(max(skip - record, 0), count)
        if hidden < count:
            yield record + hidden, _behind_lines(contents, hidden), count - hidden
        record += count


def _behind_lines(contents: bytes, count: int) -> bytes:
    at = 0
    for _ in range(count):
        at = contents.index(b"\n", at) + 1
    return contents[at:]


def _whole_lines(
    chunks: Iterator[bytes], piece_bytes: int, check: Callable[[int], None]
) -> Iterator[bytes]:
    """Yields the same bytes cut behind newlines; the last may have none.

    Args:
        chunks: the bytes.
        piece_bytes: about how many come at a time.
        check: told how long a line is so far.
    """
    begun: list[bytes] = []
    size = 0
    for chunk in chunks:
        for at in range(0, len(chunk), piece_bytes):  # a chunk may hold more than was asked for
            part = chunk[at : at + piece_bytes]
            # A newline byte is always a newline: UTF-8 has no other use for it.
            end = part.rfind(b"\n") + 1
            if end:
                check(size + part.index(b"\n"))
                yield b"".join([*begun, part[:end]])
                begun, size = [], 0
            begun.append(part[end:])
            size += len(part) - end
            check(size)
    rest = b"".join(begun)
    if rest:
        yield rest


def line_documents(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument]]:
    """Yields the documents of the lines.

    Raises:
        InputError: bad UTF-8, bad JSON, no text, or a name that cannot be stored.
    """
    path, first = piece.file.path, piece.start.record
    for offset, stored in enumerate(piece.contents.split(b"\n")):
        line = stored.removeprefix(BOM)  # on any line: files are joined as they are
        if line and not line.isspace():  # a blank line holds no record
            origin = f"{path}:{first + offset + 1}"
            record = _parse_record(line, origin)
            yield offset, record_document(record, piece, offset, domain, origin)


def _parse_record(line: bytes, origin: str) -> dict[str, Any]:
    """Returns the JSON object of a line; its "text" is a string or null."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise bad_utf8(origin, error.start) from error
    except (ValueError, RecursionError) as error:  # ValueError also for too long an integer
        raise InputError(
            f"{origin}: not JSON that can be read ({error}); every line must be an object with a "
            "`text`; fix or remove the line, or, if the file is one value on many lines, write the "
            "objects of its list on a line each (`jq -c '.[]'`)"
        ) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise InputError(
            f"{origin}: a {kind}, must be an object with a `text`; fix the line, or write the "
            "objects of a list on a line each (`jq -c '.[]'`)"
        )
    if isinstance(record, _Repeated):
        check_once(record.names, origin)
    text = record.get("text", False)
    if not (text is None or isinstance(text, str)):
        raise InputError(
            f"{origin}: text = {str(record.get('text'))[:40]!r}, every record must have a string "
            f"`text` (it has: {', '.join(sorted(record)[:20]) or 'nothing'}); add or rename the "
            "field"
        )
    return record


class _Repeated(dict[str, Any]):
    """An object that has a key more than once; Python keeps the last."""

    names: tuple[str, ...]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.names = tuple(name for name, _ in pairs)
    return repeated
