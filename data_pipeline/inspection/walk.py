"""Every block of a tar against what must stand there: is each record what `encode_record` writes?

The document table says where each record must lie; the walk compares the blocks in order and
without gaps. So whoever reads the members one after the other, as webdataset does, finds the same
records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from zlib import crc32

import numpy as np

from data_pipeline.shard_format.array import array_header, load_array
from data_pipeline.shard_format.index import Shard
from data_pipeline.shard_format.records import array_offsets
from data_pipeline.shard_format.table import CHECKSUM_TOKENS, DocumentTable, chunk_checksums
from data_pipeline.shard_format.tar import (
    BLOCK_BYTES,
    NAME_BYTES,
    archive_end,
    is_header,
    member_header,
    padding,
    parse_header,
)


@dataclass(frozen=True)
class FolderFacts:
    """What the index says of every shard."""

    token_dtype: str
    max_token_id: int


class Walk:
    """Compares the blocks of a tar with those that its document table asks for."""

    def __init__(self, facts: FolderFacts, table: DocumentTable) -> None:
        self._dtype = np.dtype(facts.token_dtype).newbyteorder("<")
        self._max_token_id = facts.max_token_id
        self._table = table
        self._checksums = table.checksums.data  # a view: its items are plain numbers
        rows = table.rows
        array_at = array_offsets(rows)
        array_bytes = rows["tokens_offset"] - array_at + rows["num_tokens"] * self._dtype.itemsize
        self._array_at, self._array_bytes = array_at, array_bytes
        self._ends = array_at + -(-array_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._last_key = b""

    def misplaced(self, shard: Shard) -> str:
        """Returns where the table's records do not follow each other, or an empty string."""
        rows, ends = self._table.rows, self._ends
        # Each record begins where the one before ends: no gap in which a reader could find another.
        begins = np.concatenate(([0], ends[:-1]))
        wrong = (
            (rows["record_offset"] != begins)
            | (ends <= begins)
            | (ends > shard.tar_bytes)
            | (rows["num_tokens"] > shard.tar_bytes)
            | (rows["metadata_bytes"] < 0)
            | (rows["tokens_offset"] <= self._array_at)
            | (rows["tokens_offset"] > ends)
        )
        if wrong.any():
            number = int(np.argmax(wrong))
            return (
                f"document {number}: cannot lie at byte {int(rows['record_offset'][number])}, "
                f"the record before it ends at byte {int(begins[number])}"
            )
        if int(rows["record_offset"][-1]) != shard.last_record:
            return "its last record is not where the index says"
        end = int(ends[-1])
        if end + len(archive_end(end)) != shard.tar_bytes:
            return f"its last record ends at byte {end}, too far from the end of the tar"
        return ""

    def batches(self, read_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yields documents [first, last) and the byte where they end, about so many at a time."""
        first = position = 0
        while first < len(self._ends):
            within = int(np.searchsorted(self._ends, position + read_bytes, side="right"))
            # A record that is larger than read_bytes is read as a whole.
            last = max(first + 1, within)
            position = int(self._ends[last - 1])
            yield first, last, position
            first = last

    def problems(self, contents: bytes, first: int, last: int) -> Iterator[str]:
        """Yields the first problem of each damaged document; contents begin with the first."""
        rows = self._table.rows[first:last]
        base = int(rows["record_offset"][0])
        largest = self._largest_tokens(contents, base, rows)
        columns = (
            rows["record_offset"] - base,
            rows["metadata_bytes"],
            self._array_at[first:last] - base,
            self._array_bytes[first:last],
            rows["tokens_offset"] - base,
            rows["num_tokens"],
            rows["num_bytes"],
            rows["domain"],
            self._table.first_checksum[first:last],
            largest,
        )
        # plain numbers: an item of an array costs ten times as much
        each = zip(*(column.tolist() for column in columns), strict=True)
        for number, place in enumerate(each, first):
            what = self._problem(contents, base, *place)
            if what:
                yield f"document {number}: {what}"

    def _largest_tokens(self, contents: bytes, base: int, rows: np.ndarray) -> np.ndarray:
        """Returns the largest token of each document."""
        view = np.frombuffer(contents, dtype=self._dtype)
        itemsize = self._dtype.itemsize
        # Pairs of begin and end: of the stretches between, every second one is a document.
        edges = np.empty(2 * len(rows), dtype=np.int64)
        edges[::2] = (rows["tokens_offset"] - base) // itemsize
        edges[1::2] = edges[::2] + rows["num_tokens"]
        if edges[-1] == len(view):  # reduceat takes no empty part at the end
            edges = edges[:-1]
        found: np.ndarray = np.maximum.reduceat(view, edges)[::2]
        return found

    def _problem(
        self,
        contents: bytes,
        base: int,
        at: int,
        metadata_bytes: int,
        array_at: int,
        array_bytes: int,
        tokens_at: int,
        num_tokens: int,
        num_bytes: int,
        domain: int,
        checksum: int,
        largest: int,
    ) -> str:
        """Returns what is wrong with one record, or an empty string."""
        # The name is not in the table: it is taken from the header, which must then be right to the
        # byte.
        key = contents[at : max(contents.find(b".json\0", at, at + NAME_BYTES), at)]
        if not _is_member(contents, at, key + b".json", metadata_bytes):
            return _wrong_header(contents, base, at, "KEY.json", metadata_bytes)
        header_at = array_at - BLOCK_BYTES
        if not _is_member(contents, header_at, key + b".npy", array_bytes):
            name = f"{key.decode('ascii', 'replace')}.npy"
            return _wrong_header(contents, base, header_at, name, array_bytes)
        # webdataset groups members by the name before the first dot: equal neighbours would be one
        # record.
        if not key or b"." in key or b"\0" in key or key == self._last_key:
            return f"key {key!r} cannot be told from that of another record"
        self._last_key = key
        begin, end = at + BLOCK_BYTES, at + BLOCK_BYTES + metadata_bytes
        expected: dict[str, int | str] = {
            "num_bytes": num_bytes,
            "num_tokens": num_tokens,
            "domain": self._table.domains[domain],
        }
        if crc32(contents[begin:end]) != self._checksums[checksum - 1]:
            return "its metadata is not that written (checksum)"
        what = _wrong_metadata(contents[begin:end], expected)
        if what:
            return what
        stop = array_at + array_bytes
        what = self._wrong_tokens(contents, array_at, stop, tokens_at, num_tokens, checksum)
        if what:
            return what
        # A wrong byte shows in its checksum; this finds an index that is wrong.
        if largest > self._max_token_id:
            return f"token {largest} above the largest of the index, {self._max_token_id}"
        for filled in (end, stop):
            if not contents.startswith(padding(filled), filled):
                return f"something stands behind a member, at byte {base + filled}"
        return ""

    def _wrong_tokens(
        self,
        contents: bytes,
        array_at: int,
        stop: int,
        tokens_at: int,
        num_tokens: int,
        checksum: int,
    ) -> str:
        """Returns what is wrong with the array of one record, or an empty string."""
        if not contents.startswith(array_header(self._dtype.str, num_tokens), array_at):
            what = self._wrong_array(contents[array_at:stop], num_tokens, tokens_at - array_at)
            if what:
                return what
        tokens = memoryview(contents)[tokens_at:stop]
        if num_tokens <= CHECKSUM_TOKENS:  # most documents: spares an array
            sound = crc32(tokens) == self._checksums[checksum]
        else:
            found = chunk_checksums(tokens, self._dtype.itemsize)
            sound = np.array_equal(found, self._table.checksums[checksum : checksum + len(found)])
        return "" if sound else "its tokens are not those written (checksum)"

    def _wrong_array(self, stored: bytes, num_tokens: int, tokens_at: int) -> str:
        """Looks closer at an array whose header is not the usual one: another numpy's may do."""
        try:
            tokens = load_array(BytesIO(stored))
        except ValueError as error:
            return f"its tokens are not readable ({' '.join(str(error).split())})"
        if tokens.shape != (num_tokens,) or tokens.dtype != self._dtype:
            return f"tokens {tokens.dtype} {tokens.shape}, must be {self._dtype} ({num_tokens},)"
        if stored[tokens_at:] != tokens.tobytes():
            return "its tokens do not begin where the table says"
        return ""


def _is_member(contents: bytes, at: int, name: bytes, size: int) -> bool:
    """Whether the header stands there that prepare writes for a member."""
    try:
        return contents.startswith(member_header(name, size), at)
    except ValueError:  # a size that no header can tell, from a wrong table
        return False


def _wrong_header(contents: bytes, base: int, at: int, name: str, size: int) -> str:
    """Says in what a header is not the one of member `name` of `size` bytes."""
    block, where = contents[at : at + BLOCK_BYTES], f"at byte {base + at}"
    if not is_header(block):
        return f"no tar header {where}, where {name} must begin"
    try:
        found_name, found_size = parse_header(block)
    except ValueError as error:
        return f"damaged tar header {where} ({error})"
    return (
        f"member {found_name!a} of {found_size} bytes {where} is not {name} of {size} bytes "
        "as it was written"
    )


def _wrong_metadata(stored: bytes, expected: dict[str, int | str]) -> str:
    try:
        metadata = json.loads(stored.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"its metadata is not readable ({' '.join(str(error).split())})"
    if not isinstance(metadata, dict):
        return "its metadata is no object"
    for name, value in expected.items():
        if metadata.get(name) != value:
            return f"{name} = {metadata.get(name)!a}, the table says {value!a}"
    if not isinstance(metadata.get("id"), str) or not isinstance(metadata.get("source"), str):
        return "its metadata has no id or no source"
    return ""
