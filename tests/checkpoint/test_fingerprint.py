"""A tensor's fingerprint is the same however it is cut, and sees what checksums do not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megadlcm.checkpoint.fingerprint import fingerprint
from megadlcm.checkpoint.index import Piece, Range
from tests.support.cuts import cut, elements, ranges


def whole_of(values: np.ndarray) -> int:
    piece = Piece((0,) * values.ndim, values.shape)
    return fingerprint(values.reshape(-1), Range("w", piece, 0, values.size), values.shape)


@pytest.mark.parametrize("shape", [(), (5,), (50_000,), (301, 222), (7, 5, 26)])
def test_any_cut_adds_up_to_the_same_number(shape: tuple[int, ...]) -> None:
    draw = random.Random(0)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = whole_of(values)
    for dimension in (None, *range(len(shape))):
        for count in (1, 2, 3):
            for cuts in (1, 4):
                parts = [
                    part
                    for piece in cut(shape, dimension, count)
                    for part in ranges(piece, cuts, draw)
                ]
                sums = [fingerprint(elements(values, part), part, shape) for part in parts]
                assert sum(sums) % 2**64 == expected


def test_it_is_the_sum_that_is_written_down() -> None:
    """By Python's own integers."""
    values = np.array([1.5, -0.0, 3e38], np.float32)

    def mix(number: int) -> int:
        number = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return (number ^ number >> 31) | 1

    bits = [int(value) for value in values.view(np.uint32)]
    total = sum(mix(0) * mix(2**63 + i) * value for i, value in enumerate(bits)) % 2**64
    assert whole_of(values) == total


def test_it_sees_every_kind_of_change() -> None:
    values = np.random.default_rng(1).standard_normal((64, 300)).astype(np.float32)
    seen = {whole_of(values)}
    changed = []
    for _ in range(6):
        changed.append(values.copy())
    changed[0].view(np.uint32)[3, 7] ^= 1  # one bit
    changed[1][3, [7, 8]] = changed[1][3, [8, 7]]  # neighbours
    changed[2][[5, 60]] = changed[2][[60, 5]]  # rows
    changed[3] = np.roll(values, 1, axis=1)
    changed[4] = values.reshape(300, 64).T.copy()  # another shape's order
    changed[5][0, 0] = -0.0
    zero = values.copy()
    zero[0, 0] = 0.0
    for each in (*changed, zero):
        seen.add(whole_of(each))
    assert len(seen) == 8
