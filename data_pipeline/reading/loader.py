"""Global steps of samples for one data-parallel rank, read ahead by threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from data_pipeline.config import DataConfig
from data_pipeline.errors import InputError, StorageError
from data_pipeline.reading.batch import PackedBatch, Skipped, StepBatch
from data_pipeline.reading.packing import pack_windows
from data_pipeline.reading.samples import SampleReader

logger = logging.getLogger(__name__)

SAY_SECONDS = 30.0
"""Waiting for data this long is worth a line in the log."""
CLOSE_SECONDS = 5.0
"""A thread that does not end in this time hangs in a read; it is left to the end of the process."""


class _Read(NamedTuple):
    """A micro-batch that was read."""

    batch: PackedBatch
    skipped: tuple[Skipped, ...]


class StepLoader(Iterator[StepBatch]):
    """Yields StepBatch after StepBatch for ever; close it when done.

    Step i covers samples start_sample + [i * global_batch_size, (i + 1) * global_batch_size). Rank
    r owns slots [r * G / dp, (r + 1) * G / dp) of it, cut into micro-batches in order.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        start_sample: int = 0,
        reader: SampleReader | None = None,
    ) -> None:
        """Opens the train sources and starts reading.

        Args:
            data: sources, seq_len, seed, how to read.
            global_batch_size: samples of one step over all ranks.
            micro_batch_size: samples of one micro-batch.
            data_parallel_rank: this rank.
            data_parallel_size: number of ranks that share the global batch.
            start_sample: samples consumed so far; reading starts there at once.
            reader: gives the samples and is closed with the loader; None: the train sources, from
                their start.

        Raises:
            InputError: sizes that do not divide, or sources that cannot be read.
            StorageError: the storage does not answer.
        """
        _check_sizes(global_batch_size, micro_batch_size, data_parallel_size)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise AssertionError(f"rank {data_parallel_rank} of {data_parallel_size}")
        self._reader = reader or SampleReader(data, "train")
        self._data = data
        self._start_sample = start_sample
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._slots_per_rank = global_batch_size // data_parallel_size
        self._first_slot = data_parallel_rank * self._slots_per_rank
        self._per_step = self._slots_per_rank // micro_batch_size
        # Micro-batches are numbered through; threads take them in turn and put them here.
        self._done: dict[int, _Read | BaseException] = {}
        self._next_to_read = 0
        self._next_to_give = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        # Daemons, and not a pool that the interpreter waits for: a read may never return.
        self._threads = [
            threading.Thread(target=self._read_ahead, name=f"data-{number}", daemon=True)
            for number in range(data.reader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> StepBatch:
        """Returns the next step.

        Raises:
            InputError, StorageError: what the first failing read raised, now and ever after; also
                StorageError where data.timeout_seconds have passed.
        """
        # For ever: a loop that catches the error must not go on with the step after it.
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise StopIteration
        first = self._next_to_give
        reads = [self._wait_for(number) for number in range(first, first + self._per_step)]
        with self._changed:
            for number in range(first, first + self._per_step):
                # Given and forgotten together: the threads may then read one step further.
                self._done.pop(number, None)
            self._next_to_give += self._per_step
            self._changed.notify_all()
        return StepBatch(
            tuple(read.batch for read in reads),
            self._start_sample + first // self._per_step * self._global_batch_size,
            tuple(skipped for read in reads for skipped in read.skipped),
        )

    def close(self) -> None:
        """Stops the threads and lets the files go; next() then ends the iteration."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            # A read that hangs is left behind: the process ends without it.
            thread.join(max(0.0, until - time.monotonic()))
        self._reader.close()

    def _wait_for(self, number: int) -> _Read:
        """Returns a micro-batch; raises what reading it raised, or that it takes too long."""
        started = time.monotonic()
        timeout = self._data.timeout_seconds
        with self._changed:
            while number not in self._done:
                if self._closed:
                    raise StopIteration
                waited = time.monotonic() - started
                if waited >= timeout:
                    # As if the read had failed: the thread, should it return after all, changes
                    # nothing any more.
                    self._done[number] = StorageError(
                        f"no data for {timeout:g} s, still reading {self._reader.busy_with()}; "
                        "check the storage, or raise data.timeout_seconds and, above it, "
                        "parallel.collective_timeout_seconds"
                    )
                    break
                if not self._changed.wait(min(SAY_SECONDS, timeout - waited)):
                    busy = self._reader.busy_with()
                    logger.warning("waiting for data, still reading %s", busy)
            found = self._done[number]
        if isinstance(found, BaseException):
            self._failure = found
            raise found
        return found

    def _read_ahead(self) -> None:
        # Bounds the memory: that many micro-batches wait at most.
        ahead = self._data.prefetch_steps * self._per_step
        while True:
            with self._changed:
                while not self._closed and self._next_to_read >= self._next_to_give + ahead:
                    self._changed.wait()
                if self._closed:
                    return
                number = self._next_to_read
                self._next_to_read += 1
            found: _Read | BaseException
            try:
                found = self._read(number)
            except BaseException as error:  # whatever it is, the training loop must hear of it
                found = error
            with self._changed:
                # Not over what is there: the training loop may have given up on it.
                self._done.setdefault(number, found)
                self._changed.notify_all()
            if isinstance(found, BaseException):
                return

    def _read(self, number: int) -> _Read:
        step, micro_batch = divmod(number, self._per_step)
        # A function of the number alone, so that any thread may read any micro-batch.
        first_sample = self._start_sample + step * self._global_batch_size
        first_slot = self._first_slot + micro_batch * self._micro_batch_size
        slots = range(first_slot, first_slot + self._micro_batch_size)
        windows = [self._reader.window(first_sample + slot) for slot in slots]
        skipped = tuple(place for window in windows for place in window.skipped)
        return _Read(pack_windows(windows, slots, self._data.seq_len), skipped)


def _check_sizes(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> None:
    share = data_parallel_size * micro_batch_size
    if micro_batch_size < 1 or data_parallel_size < 1 or global_batch_size % share:
        raise InputError(
            f"training.global_batch_size = {global_batch_size}, must be a multiple of "
            f"data_parallel_size {data_parallel_size} x micro_batch_size {micro_batch_size}; "
            "change one of them",
            key="training.global_batch_size",
        )
    if global_batch_size < 1:
        raise InputError(
            f"training.global_batch_size = {global_batch_size}, must be >= 1",
            key="training.global_batch_size",
        )
