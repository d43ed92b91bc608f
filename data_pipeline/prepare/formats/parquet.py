"""Parquet files: rows to pieces in Arrow's stream format, and those to records; needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.fields import FIELDS, check_once, check_size, record_document
from data_pipeline.prepare.formats.format import Piece, TextDocument

# pyarrow is loaded by the functions that need it: no other format should wait for it.
if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 256
DECODED_BYTES = 32 << 20
"""No more rows are decoded at once than BATCH_ROWS, and than take about so much memory."""
BUFFER_BYTES = 1 << 20
REPEATED_BYTES = 64 << 20
"""A smaller row group is read as dictionaries: a page of a kilobyte may repeat a text of megabytes
in every row. The library keeps all texts of the group, five times, until its end."""
MOST_PACKED = 100
"""How many times smaller a larger row group may be as stored; texts are about three times so."""


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
        InputError: not a Parquet file, a damaged one, no column of texts, or too large a row.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(raw)
        columns = _columns(path, metadata.schema.to_arrow_schema())
        row = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            # Whole row groups before the place are not read: a restart costs no more than the
            # group it is in.
            if row + group.num_rows > skip:
                stored, size = _sizes(group, columns)
                _check_packing(stored, size, f"{path}: row group {number + 1}")
                # A buffer, or all of the row group would be kept in memory.
                with pyarrow.parquet.ParquetFile(
                    raw,
                    metadata=metadata,
                    page_checksum_verification=True,
                    read_dictionary=columns if size <= REPEATED_BYTES else None,
                    buffer_size=BUFFER_BYTES,
                    pre_buffer=False,
                ) as file:
                    rows = max(1, min(BATCH_ROWS, DECODED_BYTES * group.num_rows // max(size, 1)))
                    batches = file.iter_batches(rows, row_groups=[number], columns=columns)
                    yield from _pieces(path, batches, row, skip, piece_bytes)
            row += group.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a Parquet file that can be read ({reason}); write or fetch it again"
        ) from error


def _sizes(group: pyarrow.parquet.RowGroupMetaData, columns: list[str]) -> tuple[int, int]:
    """Returns how many bytes of a row group are read, as stored and unpacked."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    read = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    return (
        sum(chunk.total_compressed_size for chunk in read),
        sum(chunk.total_uncompressed_size for chunk in read),
    )


def _check_packing(stored: int, size: int, origin: str) -> None:
    """Raises InputError where a few bytes unpack to more than memory should hold."""
    if size > REPEATED_BYTES and size > MOST_PACKED * stored:
        raise InputError(
            f"{origin}: {stored:,} bytes that unpack to {size:,}, more than {MOST_PACKED} times as "
            f"many; write it again with row groups of at most {REPEATED_BYTES:,} bytes"
        )


def _pieces(
    path: Path, batches: Iterator[pyarrow.RecordBatch], row: int, skip: int, piece_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    waiting: list[pyarrow.RecordBatch] = []
    size = 0
    for whole in batches:
        start = min(max(skip - row, 0), whole.num_rows)
        ends = _ends(path, whole, row)
        while start < whole.num_rows:
            # The row that brings the piece to its size is its last, however large.
            before = int(ends[start - 1]) if start else 0
            last = int(np.searchsorted(ends, before + piece_bytes - size))
            stop = min(last + 1, whole.num_rows)
            waiting.append(_decoded(whole.slice(start, stop - start)))
            size += int(ends[stop - 1]) - before
            start = stop
            if size >= piece_bytes:
                yield _encoded(waiting, row + stop)
                waiting, size = [], 0
        row += whole.num_rows
    if waiting:
        yield _encoded(waiting, row)


def _ends(path: Path, batch: pyarrow.RecordBatch, row: int) -> np.ndarray:
    """Returns where each row of a batch ends, in bytes, if its values lay one after the other.

    Args:
        path: the file, for messages.
        batch: the rows.
        row: rows of the file before them.

    Returns:
        int64 (num_rows,).
    """
    import pyarrow
    import pyarrow.compute

    sizes = np.full(batch.num_rows, 8, dtype=np.int64)  # of a number; no piece is without an end
    for column in batch.columns:
        kind = column.type
        if pyarrow.types.is_dictionary(kind):
            lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
        elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            lengths = pyarrow.compute.binary_length(column)
        else:
            continue
        sizes += np.asarray(lengths.fill_null(0))
    largest = int(sizes.argmax())
    check_size(int(sizes[largest]), f"{path}: row {row + largest + 1}")
    ends: np.ndarray = sizes.cumsum()
    return ends


def _decoded(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Returns rows whose texts stand in full, each as often as it occurs."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


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
    """Returns the columns to read after checking that there are texts, and names that are names."""
    from pyarrow import types

    check_once(schema.names, str(path))
    if "text" not in schema.names:
        raise InputError(
            f"{path}: no column `text`, every row must have one (it has: "
            f"{', '.join(schema.names) or 'none'}); add or rename the column"
        )
    columns = [name for name in FIELDS if name in schema.names]
    for name in columns:
        kind = schema.field(name).type
        # Writers keep few different texts as a dictionary; the reader hands all texts out so.
        plain = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(plain) or types.is_large_string(plain)
        if name == "text" and not is_text:
            raise InputError(f"{path}: column `text` holds {plain}, must hold strings; convert it")
        is_name = types.is_primitive(plain) or types.is_decimal(plain) or types.is_null(plain)
        if not (is_text or is_name) or types.is_boolean(plain):
            raise InputError(
                f"{path}: column `{name}` holds {plain}, must hold strings or numbers; convert or "
                "rename it"
            )
    return columns


def row_documents(piece: Piece, domain: str) -> Iterator[tuple[int, TextDocument]]:
    """Yields the documents of the rows.

    Raises:
        InputError: a value that is not UTF-8, or a time that cannot be; names file and row.
    """
    import pyarrow

    table = pyarrow.ipc.open_stream(piece.contents).read_all()
    columns = [table.column(name) for name in table.column_names]
    for at in range(table.num_rows):
        origin = f"{piece.file.path}: row {piece.start.record + at + 1}"
        try:
            # Value by value: one bad row would spoil them all.
            values = [column[at].as_py() for column in columns]
        except UnicodeDecodeError as error:
            raise InputError(
                f"{origin}: byte {error.start} of a value is not UTF-8, all input must be; "
                "fix the row"
            ) from error
        except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException) as error:
            # A time of the year 300,000, of half a microsecond, or of a zone that nobody knows.
            reason = " ".join(str(error).split())
            raise InputError(
                f"{origin}: a value that has no spelling ({reason}); write the column as strings"
            ) from error
        record = dict(zip(table.column_names, values, strict=True))
        yield at, record_document(record, piece, at, domain, origin)
