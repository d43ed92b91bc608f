"""One shard, every byte of it: is each record what `records.encode_record` writes?

The document table says where each record must lie; the walk compares every block of the tar with
what must stand there, in order and without gaps. So whoever reads the members one after the other,
as webdataset does, finds the same records. The bytes are read once, and hashed as they pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data_pipeline.errors import InputError, StorageError
from data_pipeline.reading.sources import shard_problem
from data_pipeline.shard_format.array import array_header, load_array
from data_pipeline.shard_format.index import DomainCounts, Shard, count_domain
from data_pipeline.shard_format.records import array_offsets
from data_pipeline.shard_format.table import (
    CHECKSUM_TOKENS,
    DocumentTable,
    chunk_checksums,
    decode_table,
)
from data_pipeline.shard_format.tar import (
    BLOCK_BYTES,
    NAME_BYTES,
    archive_end,
    is_header,
    member_header,
    padding,
    parse_header,
)
from data_pipeline.storage.interface import Storage, StoredFile

READ_BYTES = 1 << 22
"""Read and hashed at once; a longer record is read as a whole."""

SHOWN_DOCUMENTS = 20
"""Damaged documents of a shard that are told one by one."""


@dataclass(frozen=True)
class FolderFacts:
    """What the index says of every shard."""

    token_dtype: str
    max_token_id: int


class ShardReport(NamedTuple):
    """What was found in one shard."""

    problems: tuple[str, ...]
    unread: bool
    """Whether the storage did not give the bytes, so that nothing is known of them."""
    domains: dict[str, DomainCounts] | None
    """By name; None where the document table cannot be read."""


def verify_shard(
    storage: Storage, facts: FolderFacts, shard: Shard, advance: Callable[[int], object]
) -> ShardReport:
    """Reads every byte of a shard and of its document table.

    Args:
        storage: the folder.
        facts: of its index.
        shard: which shard.
        advance: told how many bytes of the tar are done each time some are.
    """
    told = 0

    def tell(num_bytes: int) -> None:
        # A second look at a shard, or one that ends early, must not count bytes twice or not at all
        nonlocal told
        num_bytes = min(num_bytes, shard.tar_bytes - told)
        told += num_bytes
        if num_bytes:
            advance(num_bytes)

    try:
        report = _look(storage, facts, shard, tell)
        if report.problems and storage.distrust(shard.tar_name):
            report = _look(storage, facts, shard, tell)  # the copy is gone: now the store's bytes
    except StorageError as error:
        report = ShardReport((str(error),), True, None)
    except InputError as error:
        report = ShardReport((str(error),), False, None)
    except FileNotFoundError as error:  # it was there a moment ago
        report = ShardReport((f"{error.filename or shard.tar_name}: missing",), False, None)
    tell(shard.tar_bytes)
    return report


def _look(
    storage: Storage, facts: FolderFacts, shard: Shard, advance: Callable[[int], object]
) -> ShardReport:
    problem = shard_problem(storage, shard)
    if problem:
        return ShardReport((problem,), False, None)
    problems: list[str] = []
    table = _read_table(storage, shard, problems)
    path = storage.path(shard.tar_name)
    file = storage.open(shard.tar_name, shard.tar_bytes, shard.tar_sha256)
    walk = None
    if table:
        walk = _Walk(facts, table)
        misplaced = walk.misplaced(shard)
        # Without sound places a walk would tell of every record; the digest still says if bytes
        # differ.
        if misplaced:
            problems.append(f"{storage.path(shard.table_name)}: {misplaced}")
            walk = None
    digest, found = _read_through(file, shard, walk, advance)
    # Told beside the records: it finds what no record covers, they say where it is.
    if digest != shard.tar_sha256:
        problems.append(f"{path}: sha256 differs from the index")
    problems += [f"{path}: {what}" for what in found[:SHOWN_DOCUMENTS]]
    if len(found) > SHOWN_DOCUMENTS:
        problems.append(f"{path}: {len(found) - SHOWN_DOCUMENTS:,} more problems of this kind")
    return ShardReport(tuple(problems), False, _domain_counts(table) if table else None)


def _read_table(storage: Storage, shard: Shard, problems: list[str]) -> DocumentTable | None:
    """Returns the document table if it can be used; adds what is wrong with it."""
    path = storage.path(shard.table_name)
    contents = storage.read_bytes(shard.table_name)
    if hashlib.sha256(contents).digest() != shard.table_sha256:
        problems.append(f"{path}: sha256 differs from the index")
        return None
    try:
        table = decode_table(contents)
    except ValueError as error:
        problems.append(f"{path}: no document table ({' '.join(str(error).split())})")
        return None
    rows = table.rows
    totals = (len(rows), int(rows["num_tokens"].sum()), int(rows["num_bytes"].sum()))
    if totals != (shard.num_documents, shard.num_tokens, shard.num_bytes):
        problems.append(f"{path}: documents, tokens, bytes {totals} differ from the index")
    return table


def _domain_counts(table: DocumentTable) -> dict[str, DomainCounts]:
    counts: dict[str, DomainCounts] = {}
    for number, name in enumerate(table.domains):
        rows = table.rows[table.rows["domain"] == number]
        own = DomainCounts(len(rows), int(rows["num_tokens"].sum()), int(rows["num_bytes"].sum()))
        count_domain(counts, name, own)
    return counts


def _read_through(
    file: StoredFile, shard: Shard, walk: _Walk | None, advance: Callable[[int], object]
) -> tuple[bytes, list[str]]:
    """Returns the sha256 of a tar, and what is wrong with its records."""
    digest = hashlib.sha256()
    found: list[str] = []
    position = 0
    for first, last, stop in walk.batches() if walk else ():
        contents = file.pread(stop - position, position)
        digest.update(contents)
        # Reading on would blame each record that follows for what is missing here.
        if len(contents) != stop - position:
            found.append(f"ends {stop - position - len(contents)} bytes too early")
            return digest.digest(), found
        if walk:
            found += walk.problems(contents, first, last)
        advance(len(contents))
        position = stop
    end = position
    while position < shard.tar_bytes:
        contents = file.pread(min(READ_BYTES, shard.tar_bytes - position), position)
        if not contents:
            break
        digest.update(contents)
        # Behind the last record a tar holds zeros alone: anything else a reader could take for a
        # member.
        if walk and contents.count(0) != len(contents):
            found.append(f"something stands behind the last record, after byte {end}")
            walk = None
        advance(len(contents))
        position += len(contents)
    return digest.digest(), found


class _Walk:
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

    def batches(self) -> Iterator[tuple[int, int, int]]:
        """Yields documents [first, last) and the byte where they end, READ_BYTES at a time."""
        first = position = 0
        while first < len(self._ends):
            within = int(np.searchsorted(self._ends, position + READ_BYTES, side="right"))
            # A record that is larger than READ_BYTES is read as a whole.
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
        if not sound:
            return "its tokens are not those written (checksum)"
        # A wrong byte shows in its checksum; this finds an index that is wrong.
        if largest > self._max_token_id:
            return f"token {largest} above the largest of the index, {self._max_token_id}"
        for filled in (end, stop):
            if not contents.startswith(padding(filled), filled):
                return f"something stands behind a member, at byte {base + filled}"
        return ""

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
