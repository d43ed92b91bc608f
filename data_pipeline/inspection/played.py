"""The samples of one source as arrays: places in the stream, shards, shuffle blocks.

`order.SourceOrder` answers for one window; here its permutations are taken for a million windows at
once, and the invariants of the order are checked on them. Reads indexes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.reading.order import SourceOrder
from data_pipeline.shard_format.index import ShardIndex
from data_pipeline.shard_format.table import most_table_bytes


class Played(NamedTuple):
    """The samples of one source in a simulation, in the order of their numbers."""

    samples: np.ndarray
    """int64 (n,): sample numbers of the run."""
    epochs: np.ndarray
    """int64 (n,)."""
    starts: np.ndarray
    """int64 (n,): first stream position of each window."""
    stops: np.ndarray
    """int64 (n,): one past its last."""
    first_turns: np.ndarray
    """int64 (n,): place in the epoch's order of shards of the first that it touches."""
    last_turns: np.ndarray
    """int64 (n,): of the last."""


class BlockCost(NamedTuple):
    """What one shuffle block of a source touches."""

    num_shards: int
    tar_bytes: int
    table_bytes: int
    """Of their document tables in memory."""


class PlayedSource:
    """A source of a simulation: its index, its order, what is played of it."""

    def __init__(self, index: ShardIndex, data: DataConfig, key: int) -> None:
        """Prepares the order of one source.

        Args:
            index: of its shard folder.
            data: seq_len, seed (None counts as 0), shuffle_block.
            key: number of the source.
        """
        self.index = index
        self._seq_len, self._block_size = data.seq_len, data.shuffle_block
        rows = index.shards.rows
        self._tar_bytes = rows["tar_bytes"]
        self._table_bytes = most_table_bytes(rows["num_documents"], rows["num_tokens"])
        self._order = SourceOrder(
            index.shard_stream_tokens,
            # A simulation reads no shard: to ask for a document table is a mistake in the order.
            _no_table,
            seq_len=data.seq_len,
            seed=data.seed or 0,
            key=key,
            shuffle_block=data.shuffle_block,
        )
        self.num_windows = self._order.num_windows

    def play(self, samples: np.ndarray, first_turn: int) -> Played:
        """Returns the places of the source's samples first_turn, first_turn + 1, ...

        Args:
            samples: int64 (n,): their numbers in the run.
            first_turn: samples that the source gave before.
        """
        turns = np.arange(first_turn, first_turn + len(samples), dtype=np.int64)
        epochs, positions = np.divmod(turns, self.num_windows)
        blocks = positions // self._block_size
        starts = positions * self._seq_len
        first_turns, last_turns = np.empty_like(turns), np.empty_like(turns)
        # A block of one window stays where it is: there is nothing to permute.
        for part in runs_of(epochs, blocks) if self._block_size > 1 else ():
            epoch, block = int(epochs[part.start]), int(blocks[part.start])
            offsets = positions[part] - block * self._block_size
            starts[part] = self._order.windows(epoch, block)[offsets] * self._seq_len
        # The last window of an epoch is shorter.
        stops = np.minimum(starts + self._seq_len, self.index.num_stream_tokens)
        for part in runs_of(epochs):
            _, edges = self.shard_order(int(epochs[part.start]))
            first_turns[part] = np.searchsorted(edges, starts[part], side="right") - 1
            # stops - 1: the last place that is covered, not the first behind it.
            last_turns[part] = np.searchsorted(edges, stops[part] - 1, side="right") - 1
        return Played(samples, epochs, starts, stops, first_turns, last_turns)

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shards of an epoch in reading order, and where each begins in the stream."""
        order = self._order.shards(epoch)
        return np.asarray(order.shards), np.asarray(order.starts)

    def touched(self, played: Played) -> tuple[np.ndarray, np.ndarray]:
        """Returns which entry touches which shard, int64 (m,) each, in the order of the entries."""
        counts = played.last_turns - played.first_turns + 1
        entries = np.repeat(np.arange(len(counts)), counts)
        # Counts 0, 1, ... anew for each entry, without a loop over them.
        within = np.arange(len(entries)) - np.repeat(np.cumsum(counts) - counts, counts)
        turns = played.first_turns[entries] + within
        shards = np.empty_like(turns)
        epochs = played.epochs[entries]
        for part in runs_of(epochs):
            order, _ = self.shard_order(int(epochs[part.start]))
            shards[part] = order[turns[part]]
        return entries, shards

    def largest_block(self, played: Played) -> BlockCost:
        """Returns the most that a shuffle block touches, of those that the samples lie in."""
        windows = played.starts // self._seq_len
        blocks = windows // self._block_size
        found = BlockCost(0, 0, 0)
        for part in runs_of(played.epochs, blocks):
            first = int(blocks[part.start]) * self._block_size
            order, edges = self.shard_order(int(played.epochs[part.start]))
            begin = first * self._seq_len
            stop = (first + self._block_size) * self._seq_len
            end = min(stop, self.index.num_stream_tokens)
            low = int(np.searchsorted(edges, begin, side="right")) - 1
            # In stream order: windows are permuted inside of a block, so a block covers one
            # stretch.
            high = int(np.searchsorted(edges, end - 1, side="right"))
            touched = order[low:high]
            sums = (int(sizes[touched].sum()) for sizes in (self._tar_bytes, self._table_bytes))
            found = BlockCost(*map(max, found, (high - low, *sums)))
        return found

    def whole_epochs(self, played: Played) -> int:
        """Returns how many epochs lie in the samples as a whole, each of their windows once.

        Raises:
            AssertionError: a window comes twice or not at all: the order is broken.
        """
        found = 0
        windows = played.starts // self._seq_len
        for part in runs_of(played.epochs):
            # From the smallest window on: a part of an epoch far in would need a huge array.
            counts = np.bincount(windows[part] - int(windows[part].min()))
            if counts.max() > 1:
                raise AssertionError(f"epoch {played.epochs[part.start]}: a window comes twice")
            num_windows = part.stop - part.start
            # The same number of windows as an epoch has, none twice, none outside: each of them
            # once.
            if windows[part].max() >= self.num_windows or num_windows > self.num_windows:
                raise AssertionError(f"epoch {played.epochs[part.start]}: a window too many")
            if num_windows == self.num_windows:
                tokens = int((played.stops[part] - played.starts[part]).sum())
                if tokens != self.index.num_stream_tokens:
                    raise AssertionError(f"epoch {played.epochs[part.start]}: a window is left out")
                found += 1
        return found


def _no_table(shard: int) -> np.ndarray:
    raise AssertionError(f"a simulation asked for the documents of shard {shard}")


def runs_of(*columns: np.ndarray) -> Iterator[slice]:
    """Yields the stretches in which none of the columns changes.

    Args:
        columns: (n,) each, at least one.
    """
    size = len(columns[0])
    if not size:
        return
    changes = np.zeros(size - 1, dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), size]
    for begin, end in pairwise(edges):
        yield slice(begin, end)
