"""Tensors cut as layouts cut them, and at any other places."""

from __future__ import annotations

import itertools
import random

import numpy as np

from megadlcm.checkpoint.index import Piece, Range


def cut(shape: tuple[int, ...], dimension: int | None, count: int) -> list[Piece]:
    """Pieces of a tensor that `count` processes share along a dimension."""
    if dimension is None:
        return [Piece((0,) * len(shape), shape)]
    size = -(-shape[dimension] // count)
    pieces = []
    for start in range(0, shape[dimension], size):
        extent = min(size, shape[dimension] - start)
        offset, part = [0] * len(shape), list(shape)
        offset[dimension], part[dimension] = start, extent
        pieces.append(Piece(tuple(offset), tuple(part)))
    return pieces


def ranges(piece: Piece, count: int, random_cuts: random.Random) -> list[Range]:
    """A piece cut at any places."""
    places = sorted(random_cuts.randrange(piece.size + 1) for _ in range(count - 1))
    edges = [0, *places, piece.size]
    cuts = [Range("w", piece, *pair) for pair in itertools.pairwise(edges)]
    return [each for each in cuts if len(each)]


def elements(whole: np.ndarray, part: Range) -> np.ndarray:
    """The elements of a slice, as numpy takes them."""
    piece = part.piece
    box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
    return whole[box].reshape(-1)[part.start : part.stop]
