"""One shard, every byte of it: read once, hashed as it passes, and compared with its table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

from data_pipeline.errors import InputError, StorageError
from data_pipeline.inspection.walk import FolderFacts, Walk
from data_pipeline.reading.sources import shard_problem
from data_pipeline.shard_format.index import DomainCounts, Shard, count_domain
from data_pipeline.shard_format.table import (
    DocumentTable,
    decode_table,
)
from data_pipeline.storage.interface import Storage, StoredFile

READ_BYTES = 1 << 22
"""Read and hashed at once; a longer record is read as a whole."""

SHOWN_DOCUMENTS = 20
"""Damaged documents of a shard that are told one by one."""


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
        walk = Walk(facts, table)
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
    file: StoredFile, shard: Shard, walk: Walk | None, advance: Callable[[int], object]
) -> tuple[bytes, list[str]]:
    """Returns the sha256 of a tar, and what is wrong with its records."""
    digest = hashlib.sha256()
    found: list[str] = []
    position = 0
    for first, last, stop in walk.batches(READ_BYTES) if walk else ():
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
