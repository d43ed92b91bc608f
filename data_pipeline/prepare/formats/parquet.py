"""Parquet files: rows to pieces in Arrow's stream format, and those to records; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.fields import record_document
from data_pipeline.prepare.formats.format import Piece, TextDocument

# pyarrow is loaded by the functions that need it: no other format should wait for it.
if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("text", "id", "domain", "source")
BATCH_ROWS = 256
"""Rows decoded at once: texts of books, too, must fit into memory."""


def cut_rows(
    path: Path, raw: IO[bytes], skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Yields (rows of the file before, rows in Arrow's stream format, number of rows).

    Args:
        path: the file, for messages.
        raw: the file, open.
        skip: rows at the beginning to leave out; their row groups are not read.
        piece_bytes: about how many bytes come at a time.

    Raises:
        InputError: not a Parquet file, a damaged one, or no column of texts.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as file:
            columns = _columns(path, file.schema_arrow)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                # Whole row groups before the place are not read: a restart costs no more than the
                # group it is in.
                if row + rows > skip:
                    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                    yield from _pieces(batches, row, skip, piece_bytes)
                row += rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a Parquet file that can be read ({reason}); write or fetch it again"
        ) from error


def _pieces(
    batches: Iterator[pyarrow.RecordBatch], row: int, skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    waiting: list[pyarrow.RecordBatch] = []
    size = 0
    for whole in batches:
        batch = whole.slice(min(max(skip - row, 0), whole.num_rows))
        row += whole.num_rows
        if batch.num_rows:
            waiting.append(batch)
            size += batch.nbytes
        if size >= piece_bytes:
            yield _encoded(waiting, row)
            waiting, size = [], 0
    if waiting:
        yield _encoded(waiting, row)


def _encoded(batches: list[pyarrow.RecordBatch], end: int) -> tuple[int, bytes, int]:
    """Returns a piece whose last row is the one before row `end` of the file."""
    import pyarrow

    num_rows = sum(batch.num_rows for batch in batches)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return end - num_rows, sink.getvalue().to_pybytes(), num_rows


def _columns(path: Path, schema: pyarrow.Schema) -> list[str]:
    """Returns the columns to read after checking that there are texts."""
    import pyarrow

    if "text" not in schema.names:
        raise InputError(
            f"{path}: no column `text`, every row must have one (it has: "
            f"{', '.join(schema.names) or 'none'}); add or rename the column"
        )
    kind = schema.field("text").type
    # Writers keep few different texts as a dictionary; the reader hands the texts out all the same.
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain)):
        raise InputError(f"{path}: column `text` holds {kind}, must hold strings; convert it")
    return [name for name in COLUMNS if name in schema.names]


def row_documents(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument]]:
    """Yields the documents of the rows.

    Raises:
        InputError: a row without a text, or one that is not UTF-8; names file and row.
    """
    import pyarrow

    table = pyarrow.ipc.open_stream(piece.contents).read_all()
    columns = [table.column(name) for name in table.column_names]
    for at in range(table.num_rows):
        origin = f"{piece.file.path}: row {piece.start.record + at + 1}"
        try:
            # Value by value: Arrow checks no text, so that one bad row would spoil them all.
            values = [column[at].as_py() for column in columns]
        except UnicodeDecodeError as error:
            raise InputError(
                f"{origin}: byte {error.start} of a value is not UTF-8, all input must be; "
                "fix the row"
            ) from error
        record = dict(zip(table.column_names, values, strict=True))
        if record["text"] is None:
            raise InputError(f"{origin}: text is null, every row must have one; remove the row")
        yield at, record_document(record, piece, at, domain, origin)
