"""Reads documents of a shard folder at their stored offset: no scan, checked by checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from data_pipeline.errors import DamagedDataError
from data_pipeline.reading.least_recent import KEPT_BYTES, KEPT_SHARDS, LeastRecent
from data_pipeline.reading.open_files import OPEN_FILES
from data_pipeline.shard_format.index import Shard, ShardIndex, read_index
from data_pipeline.shard_format.table import CHECKSUM_TOKENS, DocumentTable, decode_table
from data_pipeline.shard_format.tar import BLOCK_BYTES
from data_pipeline.storage.interface import Location, Storage, StorageOptions, StoredFile
from data_pipeline.storage.open import open_storage


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
    """Opens the shards of a folder; for any number of threads."""

    def __init__(self, index: ShardIndex, storage: Storage) -> None:
        self.index, self.storage = index, storage
        self._shards: LeastRecent[int, OpenShard] = LeastRecent(
            KEPT_SHARDS, KEPT_BYTES, lambda shard: shard.table.num_bytes
        )

    def shard(self, number: int) -> OpenShard:
        """Returns a shard, its document table read.

        Raises:
            DamagedDataError: the table is missing or not the one that was written.
            StorageError: the storage does not answer.
        """
        return self._shards.get_or_make(
            number, lambda: OpenShard(self.index, self.storage, self.index.shards[number])
        )

    def stream_tokens(self, number: int) -> np.ndarray:
        """Returns num_tokens + 1 of each document of a shard, int64 (num_documents,)."""
        sizes: np.ndarray = self.shard(number).table.rows["num_tokens"] + 1
        return sizes

    def close(self) -> None:
        self._shards.clear()


class OpenShard:
    """Reads any part of any document of one shard; for any number of threads."""

    def __init__(self, index: ShardIndex, storage: Storage, shard: Shard) -> None:
        """Reads the document table; the tar is opened when it is first needed."""
        self.table = load_table(index, storage, shard)
        self._index, self._storage, self._shard = index, storage, shard
        self.dtype = stored_dtype(index)
        self._itemsize = self.dtype.itemsize
        # Opened at the first read: an order needs the table alone, and behind a URL opening is a
        # download.
        self._file: StoredFile | None = None
        # Views, whose items are plain numbers: an item of an array costs ten times as much.
        rows = self.table.rows
        self.num_tokens = np.ascontiguousarray(rows["num_tokens"]).data
        self._tokens_offset = np.ascontiguousarray(rows["tokens_offset"]).data
        self._first_checksum = self.table.first_checksum.data
        self._checksums = self.table.checksums.data

    def tokens(self, document: int, start: int, stop: int) -> bytes:
        """Reads tokens [start, stop) of a document.

        Args:
            document: row of the table.
            start: first token, >= 0.
            stop: one past the last, <= num_tokens of the document.

        Returns:
            The bytes of the tokens as they are stored, uint16 or uint32, little-endian.

        Raises:
            DamagedDataError: the file is missing or cut, or its bytes are not those written.
            StorageError: the storage does not answer.
        """
        if start == stop:
            return b""
        # Whole checksum chunks around the range: at most two chunks more than asked for.
        itemsize = self._itemsize
        chunk = start // CHECKSUM_TOKENS
        first = chunk * CHECKSUM_TOKENS
        last = min(-(-stop // CHECKSUM_TOKENS) * CHECKSUM_TOKENS, self.num_tokens[document])
        size = (last - first) * itemsize
        offset = self._tokens_offset[document] + first * itemsize
        at = self._first_checksum[document] + chunk
        contents = (self._file or self._opened()).pread(size, offset)
        # Most documents are one chunk, whose check costs no more than its checksum here.
        if (
            last - first > CHECKSUM_TOKENS
            or len(contents) != size
            or crc32(contents) != self._checksums[at]
        ):
            contents = self._sound(
                contents, size, offset, document, lambda found: self._wrong(found, size, at)
            )
        if stop - start == last - first:
            return contents
        return contents[(start - first) * itemsize : (stop - first) * itemsize]

    def _sound(
        self,
        contents: bytes,
        size: int,
        offset: int,
        document: int,
        problem: Callable[[bytes], str],
    ) -> bytes:
        """Returns what was read where it has no problem, else what a new copy gives."""
        wrong = problem(contents)
        if wrong and self._storage.distrust(self._shard.tar_name):
            self._file = None  # the copy it was read from is gone
            contents = self._opened().pread(size, offset)
            wrong = problem(contents)
        if wrong:
            raise self._damaged(f"document {document}: {wrong}")
        return contents

    def metadata(self, document: int) -> dict[str, Any]:
        """Reads a document's id, domain, source, num_bytes and num_tokens.

        Raises:
            DamagedDataError: it cannot be read or contradicts the document table.
            StorageError: the storage does not answer.
        """
        row = self.table.rows[document]
        offset = int(row["record_offset"]) + BLOCK_BYTES
        size, checksum = int(row["metadata_bytes"]), self._first_checksum[document] - 1

        def problem(found: bytes) -> str:
            sound = crc32(found) == self._checksums[checksum]
            return "" if sound else "its metadata is not that written (checksum)"

        contents = self._opened().pread(size, offset)
        contents = self._sound(contents, size, offset, document, problem)
        try:
            metadata = json.loads(contents)
            # Checksums prove the bytes those that were written; this, that what was written makes
            # sense.
            agrees = metadata["num_tokens"] == row["num_tokens"] and all(
                isinstance(metadata[name], str) for name in ("id", "domain", "source")
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"document {document}: its metadata is not readable"
            raise self._damaged(what) from error
        if not agrees:
            raise self._damaged(f"document {document}: its metadata contradicts the document table")
        found: dict[str, Any] = metadata
        return found

    def _wrong(self, contents: bytes, size: int, at: int) -> str:
        """Returns what is wrong with whole chunks of tokens, or an empty string."""
        if len(contents) != size:
            return f"the file ends {size - len(contents)} bytes too early"
        step = CHECKSUM_TOKENS * self._itemsize
        for number, begin in enumerate(range(0, size, step), at):
            if crc32(contents[begin : begin + step]) != self._checksums[number]:
                return "its tokens are not those written (checksum)"
        return ""

    def _opened(self) -> StoredFile:
        file = self._file
        if file is None:
            OPEN_FILES.make_room(self)  # before: a process may have no descriptor left
            shard = self._shard
            try:
                file = self._storage.open(shard.tar_name, shard.tar_bytes, shard.tar_sha256)
            except FileNotFoundError as error:
                raise missing(self._index, self._storage.path(shard.tar_name)) from error
            self._file = file
        return file

    def close_file(self) -> None:
        """Gives the tar back; whoever reads it just now keeps it, and the next read opens it."""
        self._file = None

    def _damaged(self, what: str) -> DamagedDataError:
        return damaged(self._index, self._storage.path(self._shard.tar_name), what)


def stored_dtype(index: ShardIndex) -> np.dtype[Any]:
    """Returns the type of the tokens as they are stored."""
    return np.dtype(index.token_dtype).newbyteorder("<")


def load_table(index: ShardIndex, storage: Storage, shard: Shard) -> DocumentTable:
    """Reads the document table of a shard.

    Raises:
        DamagedDataError: it is missing or not the one that was written.
        StorageError: the storage does not answer.
    """
    path = storage.path(shard.table_name)
    try:
        contents = storage.read_bytes(shard.table_name)
    except FileNotFoundError as error:
        raise missing(index, path) from error
    if hashlib.sha256(contents).digest() != shard.table_sha256:
        raise damaged(index, path, "not the document table that was written")
    try:
        table = decode_table(contents)
    except ValueError as error:
        raise damaged(index, path, f"no document table ({error})") from error
    found = (len(table.rows), table.rows["num_tokens"].sum())
    if found != (shard.num_documents, shard.num_tokens):
        raise damaged(index, path, "disagrees with the index on its documents and tokens")
    return table


def open_documents(
    location: Location, max_documents: int = 0, options: StorageOptions | None = None
) -> Iterator[Document]:
    """Yields the documents of a shard folder in shard order.

    Args:
        location: shard folder.
        max_documents: stop after this many; 0 means all.
        options: how to read the folder; None: with the usual retries.

    Raises:
        InputError: no finished shard folder, or a damaged shard.
        StorageError: the storage does not answer.
    """
    storage = open_storage(location, options)
    reader = ShardReader(read_index(location, storage), storage)
    # The count of the index, so that 0, which means all, needs no case of its own.
    left = max_documents or reader.index.num_documents
    for entry in reader.index.shards:
        if not left:
            return
        shard = reader.shard(entry.number)
        for document in range(min(entry.num_documents, left)):
            yield read_document(shard, document)
        left -= min(entry.num_documents, left)


def read_document(shard: OpenShard, document: int) -> Document:
    """Reads a whole document; raises DamagedDataError where it is damaged."""
    metadata = shard.metadata(document)
    tokens = shard.tokens(document, 0, metadata["num_tokens"])
    return Document(
        id=metadata["id"],
        domain=metadata["domain"],
        source=metadata["source"],
        num_bytes=metadata["num_bytes"],
        tokens_T=np.frombuffer(tokens, shard.dtype).astype(np.int64),
    )


def damaged(index: ShardIndex, path: str, what: str) -> DamagedDataError:
    """Returns the error for a file that is not as it was written."""
    return DamagedDataError(
        f"{path}: damaged, {what}; see `megadlcm data verify {index.location}` and prepare it again"
    )


def missing(index: ShardIndex, path: str) -> DamagedDataError:
    """Returns the error for a file that the index lists and the folder lacks."""
    return DamagedDataError(
        f"{path}: missing, but {index.location}/index.json lists it; bring it back or prepare "
        f"{index.location} again"
    )
