"""Pieces of input to documents, each flaw named with its file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.format import InputFile, Piece, TextDocument
from data_pipeline.prepare.formats.known import format_of
from data_pipeline.prepare.pieces import ReadProgress, read_pieces

EMPTY = "empty"


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
    kind = format_of(piece.file)
    for offset, found in kind.documents(piece, domain or kind.domain):
        # Numbered in the part: duplicates and reasons are kept by that number.
        yield piece.start.number + offset, found


def empty_document(document: TextDocument) -> InputError:
    """Returns the error for a document that has nothing to train on."""
    return InputError(
        f"{document.origin}: document {document.id!r} is empty (or null), a document needs at "
        "least one token; remove it or pass --skip-empty",
        key="--skip-empty",
    )


def describe_left_out(left_out: Counter[str]) -> str:
    """Returns what was left out and how often, for people; empty where nothing was."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
