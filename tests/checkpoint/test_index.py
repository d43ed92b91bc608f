"""Any cut of a tensor is put together from any other, against numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from megadlcm.checkpoint.index import Index, Piece, Range, boxes, scatter
from tests.support.cuts import cut, elements, ranges

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    SHAPES,
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_any_slice_is_found_in_any_other_cut(
    shape: tuple[int, ...], seed: int, parts: int, other_parts: int, cuts: int, other_cuts: int
) -> None:
    draw = random.Random(seed)
    dimensions = [None, *range(len(shape))]
    whole = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    stored = [
        part
        for piece in cut(shape, draw.choice(dimensions), parts)
        for part in ranges(piece, cuts, draw)
    ]
    draw.shuffle(stored)
    files = [stored[: len(stored) // 2], stored[len(stored) // 2 :]]
    contents = [
        np.concatenate([np.empty(0, np.float32), *(elements(whole, part) for part in file)])
        for file in files
    ]
    index = Index.decode(Index.of({"w": shape}, 1, files).encode())
    for piece in cut(shape, draw.choice(dimensions), other_parts):
        for wanted in ranges(piece, other_cuts, draw):
            target = np.full(len(wanted), np.nan, np.float32)
            for copy in index.plan(wanted):
                file, position = index.rows[copy.row, 4:]
                first = int(position) + copy.source
                scatter(copy, contents[file][first : first + copy.span].astype(np.float32), target)
            np.testing.assert_array_equal(target, elements(whole, wanted))


@given(SHAPES, st.integers(0, 400), st.integers(0, 400))
def test_boxes_are_few_and_make_up_the_range(
    shape: tuple[int, ...], start: int, length: int
) -> None:
    size = math.prod(shape)
    start = min(start, size)
    stop = min(start + length, size)
    whole = np.arange(size).reshape(shape)
    found = boxes(start, stop, shape)
    assert len(found) <= max(2 * len(shape) - 1, 1)
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
        for box in found
    ]
    got = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.array([], int)
    assert got.tolist() == list(range(start, stop))


def test_what_is_missing_is_named() -> None:
    whole = Piece((0, 0), (4, 6))
    index = Index.of({"w": (4, 6)}, 1, [[Range("w", whole, 0, 10), Range("w", whole, 11, 24)]])
    assert sum(copy.size for copy in index.plan(Range("w", whole, 0, 10))) == 10
    with pytest.raises(InputError, match="tensor w: its slices do not make it up"):
        index.plan(Range("w", whole, 5, 15))
    with pytest.raises(InputError, match="tensor w: its slices do not make it up"):
        index.plan(Range("w", Piece((0, 3), (4, 3)), 0, 12))
    with pytest.raises(InputError, match="tensor v is not in it"):
        index.plan(Range("v", whole, 0, 24))


def test_a_damaged_index_is_refused_whatever_the_damage() -> None:
    whole = Piece((0, 0), (4, 6))
    content = Index.of({"w": (4, 6)}, 1, [[Range("w", whole, 0, 24)]]).encode()
    for end in range(len(content)):
        with pytest.raises(InputError, match="it is no index"):
            Index.decode(content[:end])
    for rows in (
        [[0, 0, 0, 25, 0, 0]],
        [[1, 0, 0, 24, 0, 0]],
        [[0, 1, 0, 24, 0, 0]],
        [[0, 0, 5, 5, 0, 0]],
        [[0, 0, -1, 5, 0, 0]],
    ):
        wrong = Index({"w": (4, 6)}, 1, [whole], np.array(rows, np.int64))
        with pytest.raises(InputError, match="it is no index"):
            Index.decode(wrong.encode())
