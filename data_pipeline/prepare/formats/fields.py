"""The fields of a record to a document, and what a shard cannot hold of them."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.format import Piece, TextDocument


def record_document(
    record: dict[str, Any], piece: Piece, offset: int, domain: str, origin: str
) -> TextDocument:
    """Returns the document of a record.

    Args:
        record: its fields; "text" is a string.
        piece: where it stands.
        offset: records of the piece before it.
        domain: domain of records that name none.
        origin: file and place, for messages.

    Raises:
        InputError: a text or a name that cannot be stored.
    """
    text: str = record["text"]
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON may escape half a pair, which Python keeps
        raise InputError(
            f"{origin}: text holds half a surrogate pair at character {error.start}, which "
            "UTF-8 cannot store; fix the record"
        ) from error
    name = f"{piece.file.relative}:{piece.start.record + offset + 1}"
    document = TextDocument(
        id=_field(record, "id", name),
        domain=_field(record, "domain", domain),
        source=_field(record, "source", piece.file.relative),
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


def bad_utf8(origin: str, position: int) -> InputError:
    """Returns the error for bytes that are no text."""
    return InputError(
        f"{origin}: byte {position} is not UTF-8, all input must be; convert the file with iconv"
    )


def _field(record: dict[str, Any], key: str, default: str) -> str:
    """Returns an optional field as a string; the default where it is absent, empty or null."""
    value = record.get(key)
    return default if value is None or value == "" else str(value)
