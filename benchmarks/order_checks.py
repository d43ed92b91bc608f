"""What the order of a corpus promises, checked by sampling against definitions of its own.

`find_sample` says the slow way, from the permutations alone, which sample holds a token. Nothing
here asks a SourceOrder what is right, only whether it agrees.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.order import (
    DOCUMENT_ORDER,
    SHARD_ORDER,
    WINDOW_ORDER,
    SourceOrder,
    permutation,
)

NEIGHBOURS = (-1, 1)


class TokenPlace(NamedTuple):
    """One place of the stream of one document."""

    epoch: int
    shard: int
    document: int
    place: int
    """0 .. num_tokens of the document."""


class Corpus(NamedTuple):
    """A source and how it is ordered."""

    shard_stream_tokens: np.ndarray
    """int64 (num_shards,)."""
    document_stream_tokens: Callable[[int], np.ndarray]
    """Shard -> int64 (num_documents,), num_tokens + 1 each."""
    seq_len: int
    seed: int
    key: int
    shuffle_block: int

    def order(self) -> SourceOrder:
        """Returns the order under test."""
        return SourceOrder(
            self.shard_stream_tokens,
            self.document_stream_tokens,
            seq_len=self.seq_len,
            seed=self.seed,
            key=self.key,
            shuffle_block=self.shuffle_block,
        )

    @property
    def num_stream_tokens(self) -> int:
        """Places of one epoch."""
        return int(self.shard_stream_tokens.sum())

    @property
    def num_windows(self) -> int:
        """Samples of one epoch."""
        return -(-self.num_stream_tokens // self.seq_len)


@lru_cache(maxsize=64)
def permuted(size: int, seed: int, *key: int) -> list[int]:
    """Returns a permutation; kept, because sorting 100,000 shards anew for each token is slow."""
    found: list[int] = permutation(size, seed, *key).tolist()
    return found


def find_position(corpus: Corpus, at: TokenPlace) -> int:
    """Returns the stream position of a place: what all shards and documents before it add up to."""
    shards = permuted(
        len(corpus.shard_stream_tokens), corpus.seed, SHARD_ORDER, corpus.key, at.epoch
    )
    sizes = corpus.document_stream_tokens(at.shard)
    documents = permuted(len(sizes), corpus.seed, DOCUMENT_ORDER, corpus.key, at.epoch, at.shard)
    earlier_shards = shards[: shards.index(at.shard)]
    earlier_documents = documents[: documents.index(at.document)]
    base = corpus.shard_stream_tokens[earlier_shards].sum() + sizes[earlier_documents].sum()
    return int(base) + at.place


def sample_of_window(corpus: Corpus, epoch: int, window: int) -> int:
    """Returns the number of the sample that is a window of an epoch's stream."""
    block = window // corpus.shuffle_block
    first = block * corpus.shuffle_block
    size = min(corpus.shuffle_block, corpus.num_windows - first)
    order = permuted(size, corpus.seed, WINDOW_ORDER, corpus.key, epoch, block)
    return epoch * corpus.num_windows + first + order.index(window - first)


def find_sample(corpus: Corpus, at: TokenPlace) -> int:
    """Returns the number of the only sample of the source that holds a place."""
    return sample_of_window(corpus, at.epoch, find_position(corpus, at) // corpus.seq_len)


def places_of(order: SourceOrder, sample: int) -> list[TokenPlace]:
    """Returns every place that the order puts in a sample, in its order."""
    window = order.place(sample)
    return [
        TokenPlace(window.epoch, stretch.shard, document, place)
        for stretch in order.stretches(window)
        for document, start, stop in order.pieces(window.epoch, stretch)
        for place in range(start, stop)
    ]


def check_token(corpus: Corpus, order: SourceOrder, at: TokenPlace) -> None:
    """Checks that the sample that should hold a place does, once, and that no neighbour does.

    Neighbours are the samples before and after it, and those of the windows before and after.

    Raises:
        AssertionError: the order says otherwise.
    """
    position = find_position(corpus, at)
    window = position // corpus.seq_len
    expected = sample_of_window(corpus, at.epoch, window)
    places = places_of(order, expected)
    assert places.count(at) == 1, (at, expected)
    assert places.index(at) == position % corpus.seq_len, (at, expected)
    neighbours = {expected + step for step in NEIGHBOURS if expected + step >= 0}
    neighbours |= {
        sample_of_window(corpus, at.epoch, window + step)
        for step in NEIGHBOURS
        if 0 <= window + step < corpus.num_windows
    }
    for sample in neighbours:
        assert at not in places_of(order, sample), (at, sample)


def check_sample(corpus: Corpus, order: SourceOrder, sample: int, at: int) -> None:
    """Checks that a sample is full, repeats nothing, and that its places lead back to it.

    Args:
        corpus: the source.
        order: its order.
        sample: number of the sample.
        at: a place that is looked at besides the first and the last.

    Raises:
        AssertionError: the order says otherwise.
    """
    places = places_of(order, sample)
    assert len(set(places)) == len(places), sample
    short = corpus.num_stream_tokens - (corpus.num_windows - 1) * corpus.seq_len
    assert len(places) in (corpus.seq_len, short), (sample, len(places))
    for place in (places[0], places[at % len(places)], places[-1]):
        assert find_sample(corpus, place) == sample, (sample, place)


def check_block(corpus: Corpus, order: SourceOrder, epoch: int, block: int) -> int:
    """Checks that the windows of a block are disjoint and cover it; returns how many there are.

    Raises:
        AssertionError: they overlap or leave a gap.
    """
    first = block * corpus.shuffle_block
    last = min(first + corpus.shuffle_block, corpus.num_windows)
    base = epoch * corpus.num_windows
    windows = sorted(order.place(base + number)[1:] for number in range(first, last))
    starts, stops = zip(*windows, strict=True)
    assert starts[0] == first * corpus.seq_len, block
    assert stops[-1] == min(last * corpus.seq_len, corpus.num_stream_tokens), block
    assert starts[1:] == stops[:-1], block
    return len(windows)


def check_period(mixture: Mixture, period: int) -> int:
    """Checks that a period gives every source its quota, sample after sample; returns its size.

    Raises:
        AssertionError: it does not.
    """
    first = period * mixture.period
    turns = [mixture.turn(first + offset) for offset in range(mixture.period)]
    counted = Counter(turn.source for turn in turns)
    for source, quota in enumerate(mixture.quotas):
        assert counted[source] == quota, (period, source)
        numbers = [turn.number for turn in turns if turn.source == source]
        assert numbers == list(range(period * quota, (period + 1) * quota)), (period, source)
    assert mixture.counts(first) == [period * quota for quota in mixture.quotas], period
    return mixture.period


def random_place(corpus: Corpus, epoch: int, chosen: random.Random) -> TokenPlace:
    """Returns any place of any document of any shard."""
    shard = chosen.randrange(len(corpus.shard_stream_tokens))
    sizes = corpus.document_stream_tokens(shard)
    document = chosen.randrange(len(sizes))
    return TokenPlace(epoch, shard, document, chosen.randrange(int(sizes[document])))


def check_all(
    corpora: Sequence[Corpus], mixture: Mixture, num_samples: int, num_epochs: int, seed: int = 0
) -> dict[str, int]:
    """Checks random tokens, samples, blocks and mixture periods of several sources.

    Args:
        corpora: the sources.
        mixture: how they are mixed.
        num_samples: random tokens, and random samples, over all sources.
        num_epochs: of them.
        seed: chooses what is looked at.

    Returns:
        How many of each were checked.

    Raises:
        AssertionError: something is not as promised.
    """
    chosen = random.Random(seed)
    orders = [corpus.order() for corpus in corpora]
    for _ in range(num_samples):
        source = chosen.randrange(len(corpora))
        corpus, order = corpora[source], orders[source]
        at = random_place(corpus, chosen.randrange(num_epochs), chosen)
        check_token(corpus, order, at)
        sample = chosen.randrange(num_epochs * corpus.num_windows)
        check_sample(corpus, order, sample, chosen.randrange(corpus.seq_len))
    windows = 0
    for corpus, order in zip(corpora, orders, strict=True):
        last = (corpus.num_windows - 1) // corpus.shuffle_block
        for block in (0, chosen.randrange(last + 1), last):  # the last one is short
            windows += check_block(corpus, order, chosen.randrange(num_epochs), block)
        end = sample_of_window(corpus, 0, corpus.num_windows - 1)
        check_sample(corpus, order, end, -1)  # the short window that ends an epoch
    total = num_epochs * sum(corpus.num_windows for corpus in corpora)
    periods = [chosen.randrange(total // mixture.period) for _ in range(num_samples)]
    mixed = sum(check_period(mixture, period) for period in periods)
    return {
        "tokens found in their sample and in none beside it": num_samples,
        "samples whose tokens lead back to them": num_samples + len(corpora),
        "windows of whole blocks, disjoint and without a gap": windows,
        "samples of whole mixture periods": mixed,
    }
