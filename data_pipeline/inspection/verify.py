"""Is a shard folder what was written, in every byte? Shards are verified side by side."""

from __future__ import annotations

import os
import re
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

from data_pipeline.errors import InputError, StorageError
from data_pipeline.inspection.verify_shard import ShardReport, verify_shard
from data_pipeline.inspection.walk import FolderFacts
from data_pipeline.options import check_least
from data_pipeline.progress import Progress, say
from data_pipeline.reading.sources import read_tokenizer
from data_pipeline.shard_format.index import DomainCounts, Shard, ShardIndex, count_domain
from data_pipeline.shard_format.prepared import PREPARED_FILE, decode_prepared
from data_pipeline.storage.interface import Storage, StorageOptions
from data_pipeline.storage.open import open_storage

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

SHARDS_AHEAD = 4
"""Shards per process that are handed out before the first of them is done."""
LOOK_SECONDS = 0.2
SHARD_FILE = re.compile(r"(shard-.*)\.(tar|documents\.npy)")


class Unread(str):
    """A problem of the storage: it says nothing on the bytes."""


def available_cores() -> int:
    """Returns the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has, inside a job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def verify_folder(
    index: ShardIndex, options: StorageOptions | None = None, workers: int = 1
) -> Iterator[str]:
    """Yields every problem of a shard folder, reading each byte of it.

    Checks the tokenizer, prepared.json, each shard's size and sha256, that its records are those
    its document table tells of and can be read the way webdataset does, the counts of shards and
    domains, and that no shard lies beside those the index lists. Shows its progress. The problems
    and their order do not depend on the number of processes.

    Args:
        index: of the folder.
        options: how to read it; None: with the usual retries and no cache.
        workers: processes that verify shards; 1: this one.

    Yields:
        One line each; an `Unread` where the storage did not give the bytes.

    Raises:
        InputError: no such number of processes.
        RuntimeError: a verifying process was killed.
    """
    check_least("--workers", workers, 1)
    storage = open_storage(index.location, options)
    yield from _tokenizer_problems(index, storage)
    yield from _prepared_problems(storage)
    domains: dict[str, DomainCounts] = {}
    all_counted = True
    total = sum(shard.tar_bytes for shard in index.shards)
    with Progress("verify", total, "bytes") as progress:
        for report in _reports(index, storage, options, workers, progress):
            # An unread shard says nothing on its bytes, which the exit code must tell from damage.
            yield from (map(Unread, report.problems) if report.unread else report.problems)
            all_counted = all_counted and report.domains is not None
            for name, counts in (report.domains or {}).items():
                count_domain(domains, name, counts)
    if all_counted:  # else every domain of a lost shard would be wrong again
        yield from _domain_problems(index, domains)
    yield from _unlisted_files(index, storage)


def _tokenizer_problems(index: ShardIndex, storage: Storage) -> Iterator[str]:
    """Yields what is wrong with the tokenizer kept with the shards."""
    try:
        read_tokenizer(index, storage)
    except InputError as error:
        yield str(error)
    except StorageError as error:
        yield Unread(error)


def _prepared_problems(storage: Storage) -> Iterator[str]:
    """Yields what is wrong with the account of the folder's making."""
    path = storage.path(PREPARED_FILE)
    try:
        decode_prepared(storage.read_bytes(PREPARED_FILE))
    except FileNotFoundError:
        yield f"{path}: missing"
    except (ValueError, RecursionError) as error:
        yield f"{path}: damaged ({' '.join(str(error).split())})"
    except StorageError as error:
        yield Unread(error)


def _domain_problems(index: ShardIndex, domains: dict[str, DomainCounts]) -> Iterator[str]:
    # Domains on either side alone are differences, too.
    nothing = DomainCounts(0, 0, 0)
    for name in sorted({*index.domains, *domains}):
        found, listed = domains.get(name, nothing), index.domains.get(name, nothing)
        if found != listed:
            yield (
                f"{index.location}: domain {name}: documents, tokens, bytes {tuple(found)} differ "
                f"from the index, {tuple(listed)}"
            )


def _unlisted_files(index: ShardIndex, storage: Storage) -> Iterator[str]:
    """Yields the files of shards that the index does not know."""
    try:
        names = storage.names()
    except (FileNotFoundError, InputError, StorageError) as error:
        # many web servers list no folder
        reason = " ".join(str(error).split())
        say(f"{index.location}: lists no files, so there may be shards beside the index ({reason})")
        return
    listed = {shard.name for shard in index.shards}
    for name in names:
        found = SHARD_FILE.fullmatch(name)
        if found and found[1] not in listed:
            yield f"{storage.path(name)}: not in the index"


def _reports(
    index: ShardIndex,
    storage: Storage,
    options: StorageOptions | None,
    workers: int,
    progress: Progress,
) -> Iterator[ShardReport]:
    """Yields a report per shard, in the order of the shards."""
    facts = FolderFacts(index.token_dtype, index.max_token_id)
    # Processes without a shard would only be started and ended.
    workers = min(workers, len(index.shards))
    if workers > 1:
        yield from _in_processes(index, facts, options, workers, progress)
        return
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress.update(done, done)

    for shard in index.shards:
        yield verify_shard(storage, facts, shard, advance)


def _in_processes(
    index: ShardIndex,
    facts: FolderFacts,
    options: StorageOptions | None,
    workers: int,
    progress: Progress,
) -> Iterator[ShardReport]:
    # Not fork: the parent has threads of the storage, whose locks a fork would copy as they are.
    context = get_context("spawn")
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _begin, (index.location, options, facts, done))
    try:
        for future in _submitted(pool, index.shards, SHARDS_AHEAD * workers):
            # The first shard may take minutes: progress counts bytes, which the processes share.
            while not wait([future], timeout=LOOK_SECONDS).done:
                progress.update(done.value, done.value)
            progress.update(done.value, done.value)
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a verifying process ended without a word, mostly for want of memory; start the same "
            "command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor, shards: Iterable[Shard], most: int
) -> Iterator[Future[ShardReport]]:
    """Yields the futures of the shards in order, at most that many of them under way."""
    ahead: deque[Future[ShardReport]] = deque()
    for shard in shards:
        # A bounded number ahead: 100,000 futures would all be kept until the first is asked for.
        ahead.append(pool.submit(_verify, shard))
        if len(ahead) == most:
            yield ahead.popleft()
    yield from ahead


class _Process:
    """What a verifying process keeps between shards."""

    def __init__(
        self,
        location: str,
        options: StorageOptions | None,
        facts: FolderFacts,
        done: Synchronized[int],
    ) -> None:
        self.storage = open_storage(location, options)
        self.facts, self._done = facts, done

    def advance(self, num_bytes: int) -> None:
        with self._done.get_lock():
            self._done.value += num_bytes


_process: _Process | None = None


def _begin(
    location: str, options: StorageOptions | None, facts: FolderFacts, done: Synchronized[int]
) -> None:
    global _process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _process = _Process(location, options, facts, done)


def _verify(shard: Shard) -> ShardReport:
    if _process is None:
        raise AssertionError("the process was not prepared")
    return verify_shard(_process.storage, _process.facts, shard, _process.advance)
