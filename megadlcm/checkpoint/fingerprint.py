"""One number for a tensor that any share-out of it over processes adds up to.

    fingerprint = sum of weight(i) x bits(i) modulo 2^64

over its elements, i the flat index in the whole tensor, bits those of the fp32 value; weight(i) is
A(i // 2^14) x B(i mod 2^14), A and B odd numbers by SplitMix64. Compared after a load it proves
that every element came to its place, which checksums of files cannot. -0.0 and 0.0 are two values.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megadlcm.checkpoint.index import Range

_CHUNK = 1 << 14
_MANY = 1 << 20
_Words = NDArray[np.uint64]


def fingerprint(values: NDArray[np.float32], part: Range, shape: tuple[int, ...]) -> int:
    """Sum of a slice; those of all slices of a tensor add up to its fingerprint, modulo 2^64.

    Args:
        values: elements of the slice.
        part: which they are.
        shape: of the whole tensor.

    Returns:
        A number below 2^64.
    """
    bits = values.view(np.uint32)
    if part.piece.shape[1:] == shape[1:]:  # rows of the tensor: its flat index goes on
        before = part.piece.offset[0] * math.prod(shape[1:]) if shape else 0
        return _sum_in_a_row(bits, before + part.start)
    total = 0
    for start in range(0, len(bits), _MANY):
        block = bits[start : start + _MANY]
        places = np.arange(part.start + start, part.start + start + len(block))
        own = np.unravel_index(places, part.piece.shape)
        shifted = [axis + base for axis, base in zip(own, part.piece.offset, strict=True)]
        index = np.ravel_multi_index(shifted, shape)
        first = int(index[0]) // _CHUNK
        outer = _split_mix(np.arange(first, int(index[-1]) // _CHUNK + 1, dtype=np.uint64))
        weights = outer[index // _CHUNK - first] * _inner()[index % _CHUNK]
        total += int(np.dot(block.astype(np.uint64), weights))
    return total % 2**64


def _sum_in_a_row(bits: NDArray[np.uint32], first: int) -> int:
    inner, end = _inner(), first + len(bits)
    chunks = np.arange(first // _CHUNK, -(-end // _CHUNK) if len(bits) else 0, dtype=np.uint64)
    sums = np.empty(len(chunks), np.uint64)
    for number, chunk in enumerate(chunks.tolist()):
        low, high = max(chunk * _CHUNK, first), min((chunk + 1) * _CHUNK, end)
        part = bits[low - first : high - first].astype(np.uint64)
        sums[number] = np.dot(part, inner[low - chunk * _CHUNK : high - chunk * _CHUNK])
    return int(np.dot(sums, _split_mix(chunks))) if len(chunks) else 0


@cache
def _inner() -> _Words:
    return _split_mix(np.arange(_CHUNK, dtype=np.uint64) + np.uint64(1 << 63))


def _split_mix(values: _Words) -> _Words:
    """Steele et al. 2014, figure 16; made odd, so that no bit of a value is lost."""
    with np.errstate(over="ignore"):
        mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
