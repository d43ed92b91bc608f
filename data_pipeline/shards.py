"""Reads documents of a shard folder at their stored offset: no scan, checked by checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.index import Shard, ShardIndex, read_index
from data_pipeline.order import LeastRecent
from data_pipeline.records import (
    BLOCK_BYTES,
    CHECKSUM_TOKENS,
    DocumentTable,
    chunk_checksums,
    decode_table,
)

OPEN_FILES = 64
KEPT_TABLES = 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class Document:
    """One document of a shard folder."""

    id: str
    domain: str
    source: str
    num_bytes: int
    """UTF-8 bytes of the text."""
    tokens_T: np.ndarray
    """int64 (num_tokens,): the text alone, without end-of-text tokens."""


class ShardReader:
    """Reads any part of any document; for one thread, which must close it."""

    def __init__(self, index: ShardIndex) -> None:
        """Opens nothing yet."""
        self.index = index
        self._dtype = np.dtype(index.token_dtype).newbyteorder("<")
        self._files: LeastRecent[int, int] = LeastRecent(OPEN_FILES, discard=os.close)
        self._tables: LeastRecent[int, DocumentTable] = LeastRecent(KEPT_TABLES)

    def close(self) -> None:
        """Closes the files that are open."""
        self._files.clear()

    def stream_tokens(self, shard: int) -> np.ndarray:
        """Returns num_tokens + 1 of each document of a shard, int64 (num_documents,)."""
        sizes: np.ndarray = self._table(shard).rows["num_tokens"] + 1
        return sizes

    def tokens(self, shard: int, document: int, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) of a document.

        Args:
            shard: number of the shard.
            document: row of its table.
            start: first token, >= 0.
            stop: one past the last, <= num_tokens of the document.

        Returns:
            int64 (stop - start,).

        Raises:
            InputError: the file is missing or cut, or its bytes are not those written.
        """
        if start == stop:
            return np.empty(0, dtype=np.int64)
        table = self._table(shard)
        row = table.rows[document]
        # Whole checksum chunks around the range: at most two chunks more than asked for.
        first_chunk, last_chunk = start // CHECKSUM_TOKENS, -(-stop // CHECKSUM_TOKENS)
        first = first_chunk * CHECKSUM_TOKENS
        last = min(last_chunk * CHECKSUM_TOKENS, int(row["num_tokens"]))
        itemsize = self._dtype.itemsize
        offset = int(row["tokens_offset"]) + first * itemsize
        contents = self._read(shard, document, offset, (last - first) * itemsize)
        at = int(table.first_checksum[document])
        expected = table.checksums[at + first_chunk : at + last_chunk]
        if not np.array_equal(chunk_checksums(contents, itemsize), expected):
            raise self._damaged(shard, document, "its tokens are not those written (checksum)")
        stored = np.frombuffer(contents, dtype=self._dtype)
        return stored[start - first : stop - first].astype(np.int64)

    def metadata(self, shard: int, document: int) -> dict[str, Any]:
        """Reads a document's id, domain, source, num_bytes and num_tokens; raises InputError."""
        row = self._table(shard).rows[document]
        offset = int(row["record_offset"]) + BLOCK_BYTES
        contents = self._read(shard, document, offset, int(row["metadata_bytes"]))
        try:
            metadata = json.loads(contents)
            agrees = metadata["num_tokens"] == row["num_tokens"] and isinstance(metadata["id"], str)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(shard, document, "its metadata is not readable") from error
        if not agrees:
            raise self._damaged(shard, document, "its metadata contradicts the document table")
        found: dict[str, Any] = metadata
        return found

    def _table(self, shard: int) -> DocumentTable:
        return self._tables.get_or_make(shard, lambda: self._load_table(self.index.shards[shard]))

    def _load_table(self, shard: Shard) -> DocumentTable:
        path = self.index.table_path(shard)
        contents = _open_or_explain(path, self.index.folder, lambda: path.read_bytes())
        if hashlib.sha256(contents).hexdigest() != shard.table_sha256:
            raise damaged(path, self.index.folder, "not the document table that was written")
        table = decode_table(contents)
        if len(table.rows) != shard.num_documents:
            raise damaged(path, self.index.folder, f"has {len(table.rows)} documents")
        return table

    def _read(self, shard: int, document: int, offset: int, size: int) -> bytes:
        path = self.index.tar_path(self.index.shards[shard])
        folder = self.index.folder
        descriptor = self._files.get_or_make(
            shard, lambda: _open_or_explain(path, folder, lambda: os.open(path, os.O_RDONLY))
        )
        parts: list[bytes] = []
        missing = size
        while missing:
            part = os.pread(descriptor, missing, offset + size - missing)
            if not part:
                raise self._damaged(shard, document, f"the file ends {missing} bytes too early")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _damaged(self, shard: int, document: int, what: str) -> InputError:
        path = self.index.tar_path(self.index.shards[shard])
        return damaged(path, self.index.folder, f"document {document}: {what}")


def open_documents(folder: str | Path, max_documents: int = 0) -> Iterator[Document]:
    """Yields the documents of a shard folder in shard order.

    Args:
        folder: shard folder.
        max_documents: stop after this many; 0 means all.

    Raises:
        InputError: no finished shard folder, or a damaged shard.
    """
    reader = ShardReader(read_index(folder))
    left = max_documents or reader.index.num_documents
    try:
        for shard, entry in enumerate(reader.index.shards):
            for document in range(min(entry.num_documents, left)):
                yield read_document(reader, shard, document)
            left -= min(entry.num_documents, left)
    finally:
        reader.close()


def read_document(reader: ShardReader, shard: int, document: int) -> Document:
    """Reads a whole document; raises InputError where it is damaged."""
    metadata = reader.metadata(shard, document)
    return Document(
        id=metadata["id"],
        domain=metadata["domain"],
        source=metadata["source"],
        num_bytes=metadata["num_bytes"],
        tokens_T=reader.tokens(shard, document, 0, metadata["num_tokens"]),
    )


def damaged(path: Path, folder: Path, what: str) -> InputError:
    """Returns the error for a file that is not as it was written."""
    return InputError(
        f"{path}: damaged, {what}; see `megadlcm data verify {folder}` and prepare it again"
    )


def _open_or_explain(path: Path, folder: Path, read: Callable[[], Result]) -> Result:
    try:
        return read()
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing, but {folder}/index.json lists it; bring it back or prepare "
            f"{folder} again"
        ) from error
