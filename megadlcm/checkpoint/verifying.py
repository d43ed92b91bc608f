"""Verifies checkpoints: quickly by names and sizes, or every block of every file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.folder import Checkpoint, open_checkpoint, quick_look, step_of
from megadlcm.checkpoint.format import BLOCK_BYTES, Manifest, block_problem
from megadlcm.checkpoint.storage import CheckpointStorage

_TASK_BLOCKS = 16
_MOST_LISTED = 3
Watch = Callable[[int], None]
"""Called with each number of bytes that was read."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a checkpoint."""

    name: str
    problem: str = ""
    """What is wrong with it; empty where nothing is."""
    is_gone: bool = False
    """Whether it was removed while it was looked at."""
    num_bytes: int = 0
    """Of its files."""


def verify(
    storage: CheckpointStorage,
    name: str,
    *,
    quick: bool = False,
    threads: int = 4,
    watch: Watch = lambda _: None,
) -> Verdict:
    """Verifies one checkpoint, which a run may remove or replace meanwhile.

    Args:
        storage: where it lies.
        name: of its folder.
        quick: whether names, sizes and the manifest are enough.
        threads: that read at once.
        watch: sees how far it is; may be called by any of them.
    """
    while True:
        before = _manifest_bytes(storage, name)
        problem, num_bytes = _look(storage, name, quick, threads, watch)
        if not problem:
            return Verdict(name, num_bytes=num_bytes)
        after = _manifest_bytes(storage, name)
        listed = step_of(name) is None or name in storage.names()
        if not listed or (before is not None and after is None):
            return Verdict(name, is_gone=True)
        if after == before:
            return Verdict(name, problem)
        # a run has saved this step again: what was read is of two checkpoints


def _look(
    storage: CheckpointStorage, name: str, quick: bool, threads: int, watch: Watch
) -> tuple[str, int]:
    try:
        if quick:
            return "", quick_look(storage, name).num_bytes
        checkpoint = open_checkpoint(storage, name)
    except InputError as error:
        return str(error), 0
    num_bytes = checkpoint.manifest.num_bytes
    if checkpoint.manifest.format == 1:  # read when it was opened
        watch(num_bytes)
        return "", num_bytes
    problems = list(find_damage(checkpoint, threads, watch))
    more = f" and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
    return "; ".join(problems[:_MOST_LISTED]) + more, num_bytes


def find_damage(
    checkpoint: Checkpoint, threads: int = 4, watch: Watch = lambda _: None
) -> Iterator[str]:
    """Reads every block of a checkpoint, and says what is wrong, file by file."""
    tasks = list(_tasks(checkpoint.manifest))
    local = threading.local()

    def work(task: tuple[str, int, int]) -> list[str]:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BLOCK_BYTES)
        return _problems(checkpoint, *task, memoryview(local.buffer), watch)

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for problems in pool.map(work, tasks):
                yield from problems
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(manifest: Manifest) -> Iterator[tuple[str, int, int]]:
    """File, first block and end of what one thread reads in a row."""
    for file, entry in manifest.files.items():
        for first in range(0, entry.num_blocks, _TASK_BLOCKS):
            yield file, first, min(first + _TASK_BLOCKS, entry.num_blocks)


def _problems(
    checkpoint: Checkpoint, file: str, first: int, end: int, buffer: memoryview, watch: Watch
) -> list[str]:
    entry, found = checkpoint.manifest.files[file], []
    for index in range(first, end):
        start = index * BLOCK_BYTES
        part = buffer[: min(BLOCK_BYTES, entry.size - start)]
        try:
            got = checkpoint.storage.read(checkpoint.name, file, start, part)
            problem = block_problem(entry, index, part[:got])
        except (OSError, StorageError) as error:
            problem = f"block {index} cannot be read ({getattr(error, 'strerror', '') or error})"
        if problem:
            found.append(f"{file}: {problem}")
        watch(len(part))
    return found


def _manifest_bytes(storage: CheckpointStorage, name: str) -> bytes | None:
    try:
        return storage.manifest(name)
    except (OSError, StorageError):
        return None
