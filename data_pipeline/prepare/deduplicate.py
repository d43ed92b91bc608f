"""Exact deduplication of a whole input: of equal texts the first in reading order stays.

Pass 1 writes the digests of each part, sorted. Then ranges of the digests are resolved one by one,
each over all parts, so that memory does not grow with the input. Both kinds of work are taken up by
any process: one that is done with its own looks for what nobody is at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.output_folder import write_durably
from data_pipeline.prepare.encode import DIGEST_BYTES, Encoders, digest_batch, make_batches
from data_pipeline.prepare.pieces import ReadProgress, read_pieces
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.work_folder import DIGESTS_FILE, WorkFolder
from data_pipeline.progress import Progress, say
from data_pipeline.shard_format.array import save_array
from data_pipeline.storage.locks import FileLock, try_lock

RANGE_TEXTS = 1 << 23
"""Digests resolved at once, on average; about 50 bytes of memory for each."""

LOOK_AGAIN_SECONDS = 1.0


def find_duplicates(
    work: WorkFolder, plan: Plan, encoders: Encoders, first: int, step: int
) -> None:
    """Returns when the duplicates of all parts are known.

    Args:
        work: where the results go.
        plan: its parts.
        encoders: read the texts.
        first: part to begin with.
        step: the parts of this process are that many apart.

    Raises:
        InputError: a flaw of the input.
    """
    count = len(plan.parts)
    # Own parts first, so that tasks that start together do not queue for the same ones.
    own = list(range(first, count, step))
    order = own + [part for part in range(count) if part % step != first]
    sizes = sum(file.num_bytes for number in own for file in plan.parts[number])
    with Progress("look for duplicates", sizes, "texts") as progress:
        digester = _Digester(work, plan, encoders, progress)
        _take_all(order, lambda n: work.part(n) / DIGESTS_FILE, work.lock_part, digester.write)
    # All digests are there now, so that every process counts the same ranges.
    num_ranges = _num_ranges(work, count)
    folder = _duplicates_folder(work)
    folder.mkdir(exist_ok=True)
    ranges = [(first + at) % num_ranges for at in range(num_ranges)]
    _take_all(
        ranges,
        lambda n: _duplicates_file(folder, n),
        lambda n: try_lock(folder / f"{n:06d}.lock"),
        lambda n: _resolve(work, count, n, num_ranges),
    )


def duplicates_of(work: WorkFolder, part: int) -> np.ndarray:
    """Returns the numbers of the records of a part that repeat an earlier text, sorted int64."""
    # A part without duplicates still has something to concatenate.
    own: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    for path in sorted(_duplicates_folder(work).glob("*.npy")):
        parts, numbers = np.load(path, mmap_mode="r")
        start, end = np.searchsorted(parts, (part, part + 1))
        own.append(np.array(numbers[start:end]))
    return np.sort(np.concatenate(own))


def _take_all(
    units: list[int],
    result: Callable[[int], Path],
    lock: Callable[[int], FileLock | None],
    work: Callable[[int], None],
) -> None:
    """Does what nobody else does until all results are there; waits for those who are alive."""
    said = False
    while units := [unit for unit in units if not result(unit).exists()]:
        taken = 0
        for unit in units:
            held = lock(unit)
            if held is not None:
                with held:
                    taken += 1
                    # Whoever held the lock before may have done it between our look and our turn.
                    if not result(unit).exists():
                        work(unit)
        # All of the rest is locked by the living; of one that is killed the lock comes free.
        if not taken:
            if not said:
                say(f"waiting for other processes, which are at {len(units)} of the rest")
                said = True
            time.sleep(LOOK_AGAIN_SECONDS)


class _Digester:
    """Writes the digests of parts."""

    def __init__(
        self, work: WorkFolder, plan: Plan, encoders: Encoders, progress: Progress
    ) -> None:
        self._work, self._plan, self._encoders, self._progress = work, plan, encoders, progress
        self._read = ReadProgress()
        self._num_texts = 0

    def write(self, part: int) -> None:
        """Writes uint64 (3, num_texts): both halves of the digests, sorted, and the numbers."""
        batches = make_batches(part, read_pieces(self._plan.parts[part], self._read))
        digests: list[bytes] = []
        numbers: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        for _, found in self._encoders.map(digest_batch, batches):
            digests.append(found.digests)
            numbers.append(found.numbers)
            self._num_texts += len(found.numbers)
            self._progress.update(self._read.done_bytes, self._num_texts)
        # Big-endian halves compare as the digests themselves do.
        halves = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, DIGEST_BYTES // 8).T
        table = np.vstack((halves.astype(np.uint64), np.concatenate(numbers).astype(np.uint64)))
        # By digest, then by number: a range is one slice, and the first of equal texts comes first.
        table = table[:, np.lexsort((table[2], table[1], table[0]))]
        write_durably(self._work.part(part) / DIGESTS_FILE, save_array(table))


def _resolve(work: WorkFolder, num_parts: int, number: int, num_ranges: int) -> None:
    """Writes int64 (2, num_duplicates): part and number of each in a range of the digests."""
    # By the upper half alone: equal texts always fall into one range.
    first, behind = (at * (1 << 64) // num_ranges for at in (number, number + 1))
    columns: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    for part, table in _digests(work, num_parts):
        start = int(np.searchsorted(table[0], np.uint64(first)))
        # 2**64 fits into no uint64: so the last value inside, and what is right of it.
        end = int(np.searchsorted(table[0], np.uint64(behind - 1), side="right"))
        columns.append(np.array(table[:, start:end]))
        parts.append(np.full(end - start, part, dtype=np.int64))
    table, part_of = np.concatenate(columns, axis=1), np.concatenate(parts)
    # Stable: of equal digests the one of the earliest part, and in it the earliest, comes first.
    order = np.lexsort((table[1], table[0]))
    halves = table[:2, order]
    repeats = np.zeros(len(order), dtype=bool)
    # Sorted and stable: whatever equals its left neighbour has come before.
    repeats[1:] = (halves[:, 1:] == halves[:, :-1]).all(axis=0)
    again = order[repeats]
    found = np.vstack((part_of[again], table[2, again].astype(np.int64)))
    found = found[:, np.lexsort((found[1], found[0]))]
    write_durably(_duplicates_file(_duplicates_folder(work), number), save_array(found))


def _num_ranges(work: WorkFolder, num_parts: int) -> int:
    num_texts = sum(table.shape[1] for _, table in _digests(work, num_parts))
    return max(1, -(-num_texts // RANGE_TEXTS))


def _digests(work: WorkFolder, num_parts: int) -> Iterator[tuple[int, np.ndarray]]:
    for part in range(num_parts):
        yield part, np.load(work.part(part) / DIGESTS_FILE, mmap_mode="r")


def _duplicates_folder(work: WorkFolder) -> Path:
    return work.folder / "duplicates"


def _duplicates_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"
