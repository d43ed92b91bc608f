"""The order of a source: closed form, stable across releases, complete."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from data_pipeline.reading.least_recent import LeastRecent
from data_pipeline.reading.order import SourceOrder, permutation

RECORDED = [1, 2, 4, 6, 5, 0, 7, 3]


def test_a_permutation_is_fixed_for_ever() -> None:
    """A changed value here breaks the resume of every run that was started before."""
    assert permutation(8, 1, 2, 3).tolist() == RECORDED
    assert sorted(permutation(1000, 5, 0).tolist()) == list(range(1000))


def test_purpose_source_and_epoch_each_change_the_permutation() -> None:
    """Otherwise two shards of the same size would be read in the same order."""
    orders = [permutation(50, *key).tolist() for key in [(0, 0), (0, 1), (1, 0), (0, 0, 1)]]
    assert len({tuple(order) for order in orders}) == 4


def many_shards(num_shards: int, seq_len: int) -> SourceOrder:
    """Returns the order of shards of 10M tokens in documents of 1000."""
    sizes = np.full(10_000, 1000, dtype=np.int64)
    return SourceOrder(
        np.full(num_shards, sizes.sum(), dtype=np.int64),
        lambda shard: sizes,
        seq_len=seq_len,
        seed=0,
        key=0,
        shuffle_block=1024,
    )


def test_a_sample_of_a_large_source_looks_at_one_or_two_document_tables() -> None:
    """100,000 shards of 10M tokens: the work is the shard order and the shards it touches."""
    order = many_shards(100_000, 4096)
    tables: list[int] = []
    sound = order._document_stream_tokens

    def counted(shard: int) -> np.ndarray:
        tables.append(shard)
        return sound(shard)

    order._document_stream_tokens = counted
    place = order.place(10**9)
    stretches = order.stretches(place)
    assert not tables  # where a sample lies is known from the index alone
    pieces = [piece for stretch in stretches for piece in order.pieces(place.epoch, stretch)]
    assert place.epoch == 10**9 // order.num_windows
    assert sum(stop - start for _, start, stop in pieces) == 4096
    assert 1 <= len(tables) <= 2


def test_windows_stay_in_their_block() -> None:
    """A prefix of an epoch is read from a prefix of its stream, up to one block."""
    order = many_shards(1, 1000)
    starts = [order.place(number).start // 1000 for number in range(order.num_windows)]
    assert sorted(starts) == list(range(10_000))
    blocks = [window // 1024 for window in starts]
    assert blocks == sorted(blocks)
    assert starts != sorted(starts)


def test_a_block_of_one_keeps_the_stream_order() -> None:
    """The negative control of the test above: without a block nothing is permuted."""
    order = SourceOrder(
        np.array([100]),
        lambda shard: np.array([100]),
        seq_len=10,
        seed=0,
        key=0,
        shuffle_block=1,
    )
    assert [order.place(number).start for number in range(10)] == list(range(0, 100, 10))
    assert order.place(10).epoch == 1


def test_the_cache_lets_the_least_recent_go() -> None:
    """And what cannot be made is not kept."""
    made: list[int] = []

    def make(key: int) -> str:
        made.append(key)
        return f"value {key}"

    cache: LeastRecent[int, str] = LeastRecent(2)
    for key in (1, 2, 1, 3, 1, 3, 2):
        assert cache.get_or_make(key, partial(make, key)) == f"value {key}"
    assert made == [1, 2, 3, 2]
    cache.forget(2)
    cache.get_or_make(3, partial(make, 3))
    cache.get_or_make(2, partial(make, 2))
    assert made == [1, 2, 3, 2, 2]
    cache.clear()
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make(4, lambda: str(1 // 0))
    assert cache.get_or_make(4, partial(make, 4)) == "value 4"
