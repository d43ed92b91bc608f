"""Which stream positions a window covers: pure functions of (seed, source, window number).

Nest, per source and epoch:

    shards permuted -> documents permuted inside each shard -> one stream of tokens
    stream -> windows of seq_len, the last one shorter -> permuted inside blocks of windows

A document of n tokens takes n + 1 places of the stream (inputs [eos, t1..tn], labels
[t1..tn, eos]), so every epoch has the same N stream tokens and ceil(N / seq_len) windows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.reading.least_recent import KEPT_BYTES, KEPT_SHARDS, LeastRecent

# One number per purpose keeps the generators of a seed apart.
SHARD_ORDER, DOCUMENT_ORDER, WINDOW_ORDER, MIXTURE_ORDER = range(4)


class WindowPlace(NamedTuple):
    """Where the k-th sample of a source lies."""

    epoch: int
    start: int
    """First stream position of the epoch that it covers."""
    stop: int
    """One past its last stream position."""


class Stretch(NamedTuple):
    """The part of a window that lies in one shard."""

    shard: int
    start: int
    """First place in the shard's own stream, its documents in the order of the epoch."""
    stop: int


Piece = tuple[int, int, int]
"""Document (row of its shard's table), first place and one past the last in the document's own
stream of num_tokens + 1 places."""


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """Returns a random order of 0..size-1 that depends on (seed, key, size) alone.

    Sorts raw Philox words: numpy promises those bits across versions, and not those of
    Generator.permutation, so a run resumed after an upgrade reads the same order.

    Args:
        size: number of items.
        seed: >= 0.
        key: >= 0; purpose first, then source, epoch, ...

    Returns:
        int64 (size,).
    """
    words = np.random.Philox(np.random.SeedSequence((seed, *key))).random_raw(size)
    # Stable: equal words, as rare as they are, keep their order with every sorting algorithm.
    return np.argsort(words, kind="stable")


class ShardOrder(NamedTuple):
    """The shards of one epoch; views, whose items are plain numbers."""

    shards: memoryview
    """int64 (num_shards,): shard numbers in reading order."""
    starts: memoryview
    """int64 (num_shards + 1,): stream position where each begins; the last entry is N."""


class DocumentOrder(NamedTuple):
    """The documents of one shard in one epoch; views, whose items are plain numbers."""

    documents: memoryview
    """int64 (num_documents,): table rows in reading order."""
    starts: memoryview
    """int64 (num_documents + 1,): place inside the shard's stretch where each begins."""


class SourceOrder:
    """The order of one source; caches hold only what the functions above would give again."""

    def __init__(
        self,
        shard_stream_tokens: np.ndarray,
        document_stream_tokens: Callable[[int], np.ndarray],
        *,
        seq_len: int,
        seed: int,
        key: int,
        shuffle_block: int,
    ) -> None:
        """Prepares the order; reads no document table yet.

        Args:
            shard_stream_tokens: int64 (num_shards,), tokens + documents of each shard.
            document_stream_tokens: shard number -> int64 (num_documents,), num_tokens + 1 each.
            seq_len: stream tokens of a window.
            seed: seed of the run's data order.
            key: number of the source; no two sources of a run share one.
            shuffle_block: windows permuted among themselves.
        """
        self._shard_stream_tokens = shard_stream_tokens
        self._document_stream_tokens = document_stream_tokens
        self._seq_len = seq_len
        self._seed = seed
        self._key = key
        self._shuffle_block = shuffle_block
        self.num_stream_tokens = int(shard_stream_tokens.sum())
        self.num_windows = -(-self.num_stream_tokens // seq_len)
        self._shard_orders: LeastRecent[int, ShardOrder] = LeastRecent(2)
        self._document_orders: LeastRecent[tuple[int, int], DocumentOrder] = LeastRecent(
            KEPT_SHARDS, KEPT_BYTES, lambda order: order.documents.nbytes + order.starts.nbytes
        )
        self._block_orders: LeastRecent[tuple[int, int], np.ndarray] = LeastRecent(4)

    def place(self, number: int) -> WindowPlace:
        """Returns the place of the source's sample `number`, O(1) in the number."""
        epoch, position = divmod(number, self.num_windows)
        # No state: the place of sample 10**9 costs what that of sample 0 does.
        block, offset = divmod(position, self._shuffle_block)
        start = int(self.windows(epoch, block)[offset]) * self._seq_len
        return WindowPlace(epoch, start, min(start + self._seq_len, self.num_stream_tokens))

    def stretches(self, place: WindowPlace) -> list[Stretch]:
        """Returns the parts of a window by shard, in stream order; needs no document table."""
        order = self.shards(place.epoch)
        shards, starts = order.shards, order.starts
        turn = bisect_right(starts, place.start) - 1
        found: list[Stretch] = []
        # A window goes on in the next shard: the end of a shard is no border.
        position, last = place.start, place.stop
        while position < last:
            base, end = starts[turn], starts[turn + 1]
            stop = end if end < last else last
            found.append(Stretch(shards[turn], position - base, stop - base))
            position, turn = stop, turn + 1
        return found

    def pieces(self, epoch: int, stretch: Stretch) -> list[Piece]:
        """Returns the stretches of documents that fill a part of a window, in stream order."""
        # Reads the shard's table, the first time: `stretches` above can do without.
        order = self._documents(epoch, stretch.shard)
        documents, starts = order.documents, order.starts
        turn = bisect_right(starts, stretch.start) - 1
        position, stop = stretch.start, stretch.stop
        found: list[Piece] = []
        while position < stop:
            first, end = starts[turn], starts[turn + 1]
            last = end if end < stop else stop
            found.append((documents[turn], position - first, last - first))
            position, turn = last, turn + 1
        return found

    def windows(self, epoch: int, block: int) -> np.ndarray:
        """Returns the windows of a shuffle block in reading order, int64 (size,)."""
        first = block * self._shuffle_block
        # The last block of an epoch is smaller; its permutation depends on its size.
        size = min(self._shuffle_block, self.num_windows - first)
        return self._block_orders.get_or_make(
            (epoch, block),
            lambda: first + permutation(size, self._seed, WINDOW_ORDER, self._key, epoch, block),
        )

    def shards(self, epoch: int) -> ShardOrder:
        """Returns the shards of an epoch in reading order, and where each begins."""

        def make() -> ShardOrder:
            size = len(self._shard_stream_tokens)
            order = permutation(size, self._seed, SHARD_ORDER, self._key, epoch)
            return ShardOrder(order.data, _starts(self._shard_stream_tokens[order]).data)

        return self._shard_orders.get_or_make(epoch, make)

    def _documents(self, epoch: int, shard: int) -> DocumentOrder:
        def make() -> DocumentOrder:
            sizes = self._document_stream_tokens(shard)
            purpose = (DOCUMENT_ORDER, self._key, epoch, shard)
            order = permutation(len(sizes), self._seed, *purpose)
            return DocumentOrder(order.data, _starts(sizes[order]).data)

        return self._document_orders.get_or_make((epoch, shard), make)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
