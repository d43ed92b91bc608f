"""What a format of input files has to tell, and what passes between it and the rest of prepare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

DEFAULT_DOMAIN = "text"
BINARY = "binary"
"""Why a file of a source tree is no document."""


@dataclass(frozen=True)
class InputFile:
    """One file found by an --input."""

    path: Path
    relative: str
    """Path below the fixed part of the pattern: the same wherever the corpus lies."""
    num_bytes: int
    """Size as stored."""
    tree: str = ""
    """Name of the source tree it belongs to; empty for inputs of documents."""


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
    """As the format's `cut` gave them: a text, JSON lines, rows in Arrow's stream format."""
    num_records: int

    @property
    def end_number(self) -> int:
        """Number of the record behind it."""
        return self.start.number + self.num_records


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
    altered: bool = False
    """Whether its tokens spell another text, whose bytes are counted."""


Cut = Callable[[Path, IO[bytes], int, int], Iterator[tuple[int, bytes, int]]]
"""Function(file, the same opened, records to skip, about how many bytes come at a time).

Yields (records of the file before, contents, number of records), each record whole. It decompresses
and finds where records end, nothing more: one process feeds many that do the rest.
"""

Documents = Callable[[Piece, str], Iterator[tuple[int, TextDocument | str]]]
"""Function(piece, domain of records that name none).

Yields (number of the record in the piece, its document or why it is none).
"""


@dataclass(frozen=True)
class Format:
    """What sets one kind of input files apart from the others."""

    endings: tuple[str, ...]
    """Of the names of its files, compression included."""
    cut: Cut
    documents: Documents
    domain: str = DEFAULT_DOMAIN
    """Of documents that name none."""
    holds_records: bool = False
    """Whether a file is many documents, which no file of a source tree is."""
