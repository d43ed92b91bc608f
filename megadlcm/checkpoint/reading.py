"""Reads slices of a checkpoint into those of a process, checking each block as it passes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from megadlcm.checkpoint.folder import Checkpoint
from megadlcm.checkpoint.format import BLOCK_BYTES, FileEntry, block_problem
from megadlcm.checkpoint.index import Copy, Range, scatter
from megadlcm.checkpoint.storage import CheckpointStorage

_WINDOW_BLOCKS = 8
"""Blocks that are read at once: whole ones, as only these have a checksum."""
_MOST_BYTES = (_WINDOW_BLOCKS - 1) * BLOCK_BYTES
_THREADS = 2
_ITEM_BYTES = 4
Array = NDArray[Any]


@dataclass(frozen=True)
class ReadJob:
    """Elements of a file that go to an array of this process."""

    file: str
    """Name of the file."""
    offset: int
    """Byte of the first element in it."""
    copy: Copy
    """Shape of what is copied from there on."""
    target: Array
    """The wanted slice, fp32."""

    @property
    def end(self) -> int:
        """Byte after the last element."""
        return self.offset + self.copy.span * _ITEM_BYTES


@dataclass
class ReadVolume:
    """What a read took."""

    wanted: int = 0
    """Bytes that were asked for."""
    read: int = 0
    """Bytes that were read from files."""


class BlockReader:
    """Reads files of one checkpoint.

    Args:
        storage: where it is.
        name: of the checkpoint.
        entries: its files by name, as the manifest has them.
    """

    def __init__(
        self, storage: CheckpointStorage, name: str, entries: Mapping[str, FileEntry]
    ) -> None:
        self.storage, self.name, self.entries = storage, name, entries
        self.volume = ReadVolume()
        self._lock = threading.Lock()

    def run(self, jobs: Iterable[ReadJob]) -> ReadVolume:
        """Does all jobs.

        Raises:
            InputError: a block is damaged or cut; the file and the block are named.
            OSError: the storage fails.
        """
        pieces = [part for job in jobs for part in _split(job)]
        pieces.sort(key=lambda job: (job.file, job.offset))
        windows = list(_windows(pieces))
        if len(windows) < _THREADS:
            buffer = bytearray(_WINDOW_BLOCKS * BLOCK_BYTES)
            for window in windows:
                self._read(window, memoryview(buffer))
            return self.volume
        local = threading.local()

        def read(window: Sequence[ReadJob]) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(_WINDOW_BLOCKS * BLOCK_BYTES)
            self._read(window, memoryview(local.buffer))

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint read") as pool:
            futures = [pool.submit(read, window) for window in windows]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)
        return self.volume

    def _read(self, window: Sequence[ReadJob], buffer: memoryview) -> None:
        file = window[0].file
        entry = self.entries[file]
        first = window[0].offset // BLOCK_BYTES
        begin = first * BLOCK_BYTES
        end = min(-(-max(job.end for job in window) // BLOCK_BYTES) * BLOCK_BYTES, entry.size)
        got = self.storage.read(self.name, file, begin, buffer[: end - begin])
        for index in range(first, -(-end // BLOCK_BYTES)):
            low = (index - first) * BLOCK_BYTES
            high = min(low + BLOCK_BYTES, entry.size - begin, got)
            problem = block_problem(entry, index, buffer[low : max(low, high)])
            if problem:
                raise InputError(f"{file}: {problem}")
        for job in window:
            low = job.offset - begin
            source = np.frombuffer(buffer, np.uint8)[low : low + job.copy.span * _ITEM_BYTES]
            scatter(job.copy, source.view(np.float32), job.target)
        with self._lock:
            self.volume.wanted += sum(job.copy.size for job in window) * _ITEM_BYTES
            self.volume.read += end - begin


def jobs_for(checkpoint: Checkpoint, wanted: Range, key: str, target: Any) -> list[ReadJob]:
    """What is to be read for a slice.

    Raises:
        InputError: the checkpoint does not have all of it.
    """
    jobs = []
    for copy in checkpoint.index.plan(wanted):
        number, position = (int(value) for value in checkpoint.index.rows[copy.row, 4:])
        file, begin = checkpoint.places[number, key]
        jobs.append(ReadJob(file, begin + 4 * (position + copy.source), copy, target))
    return jobs


def _split(whole: ReadJob) -> Iterator[ReadJob]:
    """Cuts a job whose elements do not fit into a window, at borders of blocks where it can."""
    left = [whole]
    while left:
        job = left.pop()
        copy, size = job.copy, job.end - job.offset
        if size <= _MOST_BYTES:
            yield job
            continue
        axis = next(axis for axis, extent in enumerate(copy.extents) if extent > 1)
        step = copy.source_strides[axis] * _ITEM_BYTES
        border = (job.offset + _MOST_BYTES) // BLOCK_BYTES * BLOCK_BYTES
        count = min(max((border - job.offset) // step, 1), copy.extents[axis] - 1)
        left += [_part(job, axis, count, copy.extents[axis]), _part(job, axis, 0, count)]


def _part(job: ReadJob, axis: int, begin: int, end: int) -> ReadJob:
    copy, extents = job.copy, list(job.copy.extents)
    extents[axis] = end - begin
    part = replace(
        copy,
        source=copy.source + begin * copy.source_strides[axis],
        target=copy.target + begin * copy.target_strides[axis],
        extents=tuple(extents),
    )
    offset = job.offset + begin * copy.source_strides[axis] * _ITEM_BYTES
    return replace(job, offset=offset, copy=part)


def _windows(jobs: Sequence[ReadJob]) -> Iterator[list[ReadJob]]:
    """Jobs that one read of neighbouring blocks serves."""
    window: list[ReadJob] = []
    limit = reach = 0
    for job in jobs:
        far = job.offset > reach + BLOCK_BYTES  # nothing is gained by reading what lies between
        if window and (job.file != window[0].file or job.end > limit or far):
            yield window
            window = []
        if not window:
            limit = (job.offset // BLOCK_BYTES + _WINDOW_BLOCKS) * BLOCK_BYTES
            reach = 0
        window.append(job)
        reach = max(reach, job.end)
    if window:
        yield window
