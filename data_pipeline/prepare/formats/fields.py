"""The fields of a record to a document, and what a shard cannot hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.format import Piece, TextDocument

FIELDS = ("text", "id", "domain", "source")
"""What is read of a record."""
RECORD_BYTES = 16 << 20
"""Most bytes of a record: to encode a text takes 170 times as much memory, 300 at the worst."""
BOM = b"\xef\xbb\xbf"
"""Some editors and programs write it before UTF-8; it is no part of the text."""
# numbers, dates and the like have one plain spelling, what is nested or bytes has none
_NAMES = (str, int, float, Decimal, date, time, UUID)


def record_document(
    record: dict[str, Any], piece: Piece, offset: int, domain: str, origin: str
) -> TextDocument:
    """Returns the document of a record, empty where its text is null.

    Args:
        record: its fields; "text" is a string or None.
        piece: where it stands.
        offset: records of the piece before it.
        domain: domain of records that name none.
        origin: file and place, for messages.

    Raises:
        InputError: a text or a name that cannot be stored.
    """
    text: str = record["text"] or ""
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON may escape half a pair, which Python keeps
        raise InputError(
            f"{origin}: text holds half a surrogate pair at character {error.start}, which "
            "UTF-8 cannot store; fix the record"
        ) from error
    name = f"{piece.file.relative}:{piece.start.record + offset + 1}"
    document = TextDocument(
        id=_field(record, "id", name, origin),
        domain=_field(record, "domain", domain, origin),
        source=_field(record, "source", piece.file.relative, origin),
        text=text,
        num_bytes=num_bytes,
        origin=origin,
    )
    return storable(document)


def storable(document: TextDocument) -> TextDocument:
    """Raises InputError where a shard cannot hold what the record, or its file, is called."""
    for key in ("id", "domain", "source"):
        name: str = getattr(document, key)
        if name.isascii():
            continue
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            # the file's own name may be what cannot be printed
            origin = document.origin.encode("utf-8", "backslashreplace").decode("utf-8")
            raise InputError(
                f"{origin}: {key} = {name!r}, UTF-8 cannot store its character {error.start}; "
                "fix the record, or rename the file where it is a file's name"
            ) from error
    return document


def check_size(num_bytes: int, origin: str) -> None:
    """Raises InputError where a record would take more memory than any document is worth."""
    if num_bytes > RECORD_BYTES:
        raise InputError(
            f"{origin}: a record of more than {RECORD_BYTES:,} bytes, which is the most that one "
            "may have; cut it into documents, or fetch the file again if it should be smaller"
        )


def check_once(names: Sequence[str], origin: str) -> None:
    """Raises InputError where a field that is read stands there twice: one would be lost."""
    for name in FIELDS:
        if names.count(name) > 1:
            raise InputError(
                f"{origin}: has `{name}` {names.count(name)} times, must have it once; "
                "rename or remove the others"
            )


def bad_utf8(origin: str, position: int) -> InputError:
    """Returns the error for bytes that are no text."""
    return InputError(
        f"{origin}: byte {position} is not UTF-8, all input must be; convert the file with iconv"
    )


def _field(record: dict[str, Any], key: str, default: str, origin: str) -> str:
    """Returns an optional field as a string; the default where it is absent, empty or null."""
    value = record.get(key)
    if value is None or value == "":
        return default
    # true and NaN have a spelling, too, but nobody means them as a name
    if not isinstance(value, _NAMES) or isinstance(value, bool) or value != value:
        raise InputError(
            f"{origin}: {key} = {str(value)[:40]!r} ({type(value).__name__}), must be a string or "
            "a number; fix the record"
        )
    return str(value)
