"""Global steps of samples for one data-parallel rank, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from data_pipeline.batch import PackedBatch, StepBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import InputError
from data_pipeline.packing import pack_samples
from data_pipeline.samples import SampleReader

POLL_SECONDS = 0.1


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
    ) -> None:
        """Opens the train sources and starts reading.

        Args:
            data: sources, seq_len, seed, prefetch_steps.
            global_batch_size: samples of one step over all ranks.
            micro_batch_size: samples of one micro-batch.
            data_parallel_rank: this rank.
            data_parallel_size: number of ranks that share the global batch.
            start_sample: samples consumed so far; reading starts there at once.

        Raises:
            InputError: sizes that do not divide, or sources that cannot be read.
        """
        share = data_parallel_size * micro_batch_size
        if micro_batch_size < 1 or data_parallel_size < 1 or global_batch_size % share:
            raise InputError(
                f"training.global_batch_size = {global_batch_size}, must be a multiple of "
                f"data_parallel_size {data_parallel_size} x micro_batch_size {micro_batch_size}; "
                "change one of them"
            )
        if global_batch_size < 1:
            raise InputError(f"training.global_batch_size = {global_batch_size}, must be >= 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise AssertionError(f"rank {data_parallel_rank} of {data_parallel_size}")
        self._reader = SampleReader(data, "train")
        self._seq_len = data.seq_len
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        slots_per_rank = global_batch_size // data_parallel_size
        self._slots = range(
            data_parallel_rank * slots_per_rank, (data_parallel_rank + 1) * slots_per_rank
        )
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(data.prefetch_steps)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(start_sample,), name="data-prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> StepBatch:
        """Returns the next step; raises what the reading thread raised, now and ever after."""
        if self._failure is not None:
            raise self._failure
        while not self._closed.is_set():
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._thread.is_alive() or not self._ready.empty():
                    continue
                raise RuntimeError("the data thread ended without a word") from None
            if isinstance(item, BaseException):
                self._failure = item
                raise item
            return item
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and closes the files; next() then ends the iteration."""
        self._closed.set()
        self._thread.join()
        self._reader.close()

    def _read_ahead(self, first_sample: int) -> None:
        try:
            while not self._closed.is_set():
                self._hand_over(self._read_step(first_sample))
                first_sample += self._global_batch_size
        except BaseException as error:  # whatever it is, the training loop must hear of it
            self._hand_over(error)

    def _hand_over(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _read_step(self, first_sample: int) -> StepBatch:
        batches: list[PackedBatch] = []
        for first_slot in self._slots[:: self._micro_batch_size]:
            slots = range(first_slot, first_slot + self._micro_batch_size)
            samples = [self._reader.sample(first_sample + slot) for slot in slots]
            batches.append(pack_samples(samples, slots, self._seq_len))
        digests = tuple(digest for batch in batches for digest in batch.sample_digests)
        return StepBatch(tuple(batches), first_sample, digests)
