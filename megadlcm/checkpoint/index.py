"""Where each element of each tensor lies in a checkpoint, and which of it a process needs.

A *piece* is what tensor parallelism leaves of a tensor on one process: a box of it. A *slice* is a
flat, row-major range of a piece: what ZeRO leaves of a piece on one replica. An index lists the
slices that the files of a checkpoint hold; a plan lists what is to be copied from them into the
slices of another process, whatever layout either has. Pure: no files, no processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from data_pipeline.errors import InputError

Shape = tuple[int, ...]
_COLUMNS = ("tensor", "piece", "start", "stop", "file", "position")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor."""

    offset: Shape
    """Of its first element in the whole tensor, by dimension."""
    shape: Shape
    """Elements by dimension."""

    @property
    def size(self) -> int:
        """Elements in all."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Range:
    """A slice: elements `start` to `stop`, row-major, of a piece of a tensor."""

    tensor: str
    piece: Piece
    start: int
    stop: int

    @classmethod
    def whole(cls, tensor: str, shape: Shape) -> Range:
        """All elements of a tensor."""
        piece = Piece((0,) * len(shape), shape)
        return cls(tensor, piece, 0, piece.size)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, index: int, count: int) -> Range:
        """One of `count` ranges of nearly equal length into which this one is cut."""
        size = len(self)
        start, stop = (self.start + size * number // count for number in (index, index + 1))
        return Range(self.tensor, self.piece, start, stop)


@dataclass(frozen=True)
class Copy:
    """A box of elements that a stored slice and a wanted one have in common."""

    row: int
    """Of the index: the stored slice."""
    source: int
    """Where the box begins in the stored slice, in elements."""
    target: int
    """Where it begins in the wanted one."""
    extents: Shape
    """Elements of the box by dimension; trailing dimensions without gaps are one."""
    source_strides: Shape
    """Elements between neighbours along each dimension, where it is stored."""
    target_strides: Shape
    """The same where it is wanted."""

    @property
    def size(self) -> int:
        """Elements that are copied."""
        return math.prod(self.extents)

    @property
    def span(self) -> int:
        """Elements from the first to the last in the stored slice, gaps included."""
        strides = zip(self.extents, self.source_strides, strict=True)
        return 1 + sum((extent - 1) * stride for extent, stride in strides)


@dataclass(frozen=True)
class Index:
    """The slices of a checkpoint."""

    shapes: dict[str, Shape]
    """Whole tensors by name."""
    num_parameters: int
    """The first so many of them are parameters, and have optimizer state; the rest are buffers."""
    pieces: list[Piece]
    """Boxes that rows refer to."""
    rows: NDArray[np.int64]
    """(slices, 6): tensor, piece, start, stop, file and position, sorted by the first three;
    position is that of its first element in each array of the file."""
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", list(self.shapes))

    @classmethod
    def of(
        cls, shapes: dict[str, Shape], num_parameters: int, files: Sequence[Sequence[Range]]
    ) -> Index:
        """Indexes the slices of files, each in the order in which they lie in it."""
        numbers = {name: number for number, name in enumerate(shapes)}
        pieces: dict[Piece, int] = {}
        rows = []
        for file, ranges in enumerate(files):
            position = 0
            for each in ranges:
                piece = pieces.setdefault(each.piece, len(pieces))
                rows.append((numbers[each.tensor], piece, each.start, each.stop, file, position))
                position += len(each)
        table = np.array(rows, np.int64).reshape(-1, len(_COLUMNS))
        order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
        return cls(shapes, num_parameters, list(pieces), table[order])

    def encode(self) -> bytes:
        """The index as a safetensors file."""
        words = {
            "shapes": json.dumps(self.shapes),
            "num_parameters": str(self.num_parameters),
            "pieces": json.dumps([[piece.offset, piece.shape] for piece in self.pieces]),
            "columns": json.dumps(_COLUMNS),
        }
        return save_safetensors({"rows": self.rows}, metadata=words)

    @classmethod
    def decode(cls, content: bytes) -> Index:
        """Reads what `encode` wrote.

        Raises:
            InputError: it is no index.
        """
        try:
            (length,) = np.frombuffer(content[:8], "<u8")
            words: dict[str, str] = json.loads(content[8 : 8 + int(length)])["__metadata__"]
            shapes = {name: tuple(shape) for name, shape in json.loads(words["shapes"]).items()}
            boxes = json.loads(words["pieces"])
            if tuple(json.loads(words["columns"])) != _COLUMNS:
                raise ValueError("unknown columns")
            index = cls(
                shapes,
                int(words["num_parameters"]),
                [Piece(tuple(offset), tuple(shape)) for offset, shape in boxes],
                load_safetensors(content)["rows"],
            )
            index._check()
        except Exception as error:  # whatever a damaged file makes of it
            raise InputError(f"it is no index of slices ({error})") from error
        return index

    def _check(self) -> None:
        rows = self.rows
        if rows.dtype != np.int64 or rows.shape != (len(rows), len(_COLUMNS)) or (rows < 0).any():
            raise ValueError("its rows are no table of counts")
        sizes = np.array([piece.size for piece in self.pieces] or [0])
        if (rows[:, 0] >= len(self.names)).any() or (rows[:, 1] >= len(self.pieces)).any():
            raise ValueError("rows refer to tensors or pieces that it does not have")
        if (rows[:, 2] >= rows[:, 3]).any() or (rows[:, 3] > sizes[rows[:, 1]]).any():
            raise ValueError("a slice lies outside of its piece")
        same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
        if (same & (rows[1:, 2] < rows[:-1, 3])).any():
            raise ValueError("slices overlap, or are not sorted")

    @cached_property
    def _bounds(self) -> dict[tuple[int, int], tuple[int, int]]:
        """First and last row of each piece of each tensor."""
        if not len(self.rows):
            return {}
        keys = self.rows[:, 0] * len(self.pieces) + self.rows[:, 1]
        firsts = np.flatnonzero(np.diff(keys, prepend=-1))
        lasts = np.append(firsts[1:], len(keys))
        heads = self.rows[firsts, :2]
        return {
            (int(tensor), int(piece)): (int(first), int(last))
            for (tensor, piece), first, last in zip(heads, firsts, lasts, strict=True)
        }

    @cached_property
    def _pieces_of(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for tensor, piece in self._bounds:
            found.setdefault(tensor, []).append(piece)
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def array_sizes(self, num_files: int, keys: Sequence[str]) -> list[dict[str, int]]:
        """Elements of the arrays of each file: of `master`, which has buffers too, and of states.

        Args:
            num_files: how many there are.
            keys: kinds of optimizer state.
        """
        lengths, files = self.rows[:, 3] - self.rows[:, 2], self.rows[:, 4]
        of_parameters = np.where(self.rows[:, 0] < self.num_parameters, lengths, 0)
        masters, states = (np.zeros(num_files, np.int64) for _ in range(2))
        np.add.at(masters, files, lengths)
        np.add.at(states, files, of_parameters)
        return [
            {"master": int(all_of_it)} | dict.fromkeys(keys, int(own))
            for all_of_it, own in zip(masters, states, strict=True)
        ]

    def range_of(self, row: int) -> Range:
        """The slice of a row."""
        tensor, piece, start, stop = (int(value) for value in self.rows[row, :4])
        return Range(self.names[tensor], self.pieces[piece], start, stop)

    def plan(self, wanted: Range) -> list[Copy]:
        """Finds what of the stored slices makes up a wanted one.

        Args:
            wanted: a slice of any layout.

        Returns:
            Boxes that together are the slice.

        Raises:
            InputError: some of it, or the tensor, is not there.
        """
        number = self._numbers.get(wanted.tensor)
        if number is None:
            raise InputError(f"tensor {wanted.tensor} is not in it")
        copies: list[Copy] = []
        for piece in self._pieces_of.get(number, ()):
            copies += self._copies(number, piece, wanted)
        if sum(copy.size for copy in copies) != len(wanted):
            raise InputError(f"tensor {wanted.tensor}: its slices do not make it up")
        return copies

    def _copies(self, number: int, piece: int, wanted: Range) -> Iterator[Copy]:
        stored = self.pieces[piece]
        first, last = self._bounds[number, piece]
        if stored == wanted.piece:  # the same cut: ranges overlap in one interval
            low, high = wanted.start, wanted.stop
        else:
            bounds = _common(stored, wanted.piece)
            if bounds is None:
                return
            low, high = _flat_bounds(bounds, stored)
        starts, stops = self.rows[first:last, 2], self.rows[first:last, 3]
        begin = first + int(np.searchsorted(stops, low, side="right"))
        end = first + int(np.searchsorted(starts, high, side="left"))
        for row in range(begin, end):
            yield from _overlaps(row, self.range_of(row), wanted)


def _overlaps(row: int, stored: Range, wanted: Range) -> Iterator[Copy]:
    if stored.piece == wanted.piece:
        start, stop = max(stored.start, wanted.start), min(stored.stop, wanted.stop)
        if start < stop:
            yield Copy(row, start - stored.start, start - wanted.start, (stop - start,), (1,), (1,))
        return
    for own in boxes(stored.start, stored.stop, stored.piece.shape):
        here = Piece(_add(own.offset, stored.piece.offset), own.shape)
        for other in boxes(wanted.start, wanted.stop, wanted.piece.shape):
            common = _common(here, Piece(_add(other.offset, wanted.piece.offset), other.shape))
            if common is not None:
                yield _copy_of(row, common, stored, wanted)


def _copy_of(row: int, common: Piece, stored: Range, wanted: Range) -> Copy:
    places, strides = [], []
    for each in (stored, wanted):
        steps = _strides(each.piece.shape)
        offset = zip(common.offset, each.piece.offset, steps, strict=True)
        places.append(sum((own - base) * step for own, base, step in offset) - each.start)
        strides.append(list(steps))
    extents = list(common.shape)
    # neighbours along a dimension that follow each other in both need no dimension of their own
    for index in range(len(extents) - 2, -1, -1):
        if all(steps[index] == steps[index + 1] * extents[index + 1] for steps in strides):
            extents[index] *= extents.pop(index + 1)
            for steps in strides:
                steps[index] = steps.pop(index + 1)
    source, target = places
    return Copy(row, source, target, tuple(extents), tuple(strides[0]), tuple(strides[1]))


def boxes(start: int, stop: int, shape: Shape) -> list[Piece]:
    """Cuts a flat, row-major range into boxes, at most 2 x dimensions - 1 of them.

    Args:
        start: first element.
        stop: end.
        shape: of the array; () is one element.

    Returns:
        Boxes in the order of their elements.
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [Piece((start,) if shape else (), (stop - start,) if shape else ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _within(first, boxes(start - first * row, stop - first * row, shape[1:]))
    found: list[Piece] = []
    whole_from, whole_to = -(-start // row), stop // row
    if whole_from > first:
        found += _within(first, boxes(start - first * row, row, shape[1:]))
    if whole_to > whole_from:
        rest = (0,) * (len(shape) - 1)
        found.append(Piece((whole_from, *rest), (whole_to - whole_from, *shape[1:])))
    if whole_to <= last:
        found += _within(last, boxes(0, stop - last * row, shape[1:]))
    return found


def _within(index: int, found: list[Piece]) -> list[Piece]:
    return [Piece((index, *box.offset), (1, *box.shape)) for box in found]


def _common(one: Piece, other: Piece) -> Piece | None:
    low = tuple(max(pair) for pair in zip(one.offset, other.offset, strict=True))
    high = tuple(
        min(a + b, c + d)
        for a, b, c, d in zip(one.offset, one.shape, other.offset, other.shape, strict=True)
    )
    if any(first >= last for first, last in zip(low, high, strict=True)):
        return None
    return Piece(low, tuple(last - first for first, last in zip(low, high, strict=True)))


def _flat_bounds(box: Piece, piece: Piece) -> tuple[int, int]:
    """First element and end of a box of the whole tensor, flat in a piece that holds it."""
    steps = _strides(piece.shape)
    own = [low - base for low, base in zip(box.offset, piece.offset, strict=True)]
    first = sum(low * step for low, step in zip(own, steps, strict=True))
    last = sum(
        (low + extent - 1) * step for low, extent, step in zip(own, box.shape, steps, strict=True)
    )
    return first, last + 1


def _strides(shape: Shape) -> list[int]:
    return [math.prod(shape[index + 1 :]) for index in range(len(shape))]


def _add(one: Shape, other: Shape) -> Shape:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def scatter(copy: Copy, source: NDArray[Any], target: NDArray[Any]) -> None:
    """Copies the elements of a plan.

    Args:
        copy: what to copy.
        source: `copy.span` elements of the stored slice, from the first of the copy on.
        target: the wanted slice.
    """
    size = target.itemsize
    for part, strides in (
        (source, copy.source_strides),
        (target[copy.target :], copy.target_strides),
    ):
        reach = 1 + sum((n - 1) * step for n, step in zip(copy.extents, strides, strict=True))
        assert reach <= len(part), "a copy reaches beyond its array"
    as_strided = np.lib.stride_tricks.as_strided
    steps = [
        tuple(step * size for step in each) for each in (copy.source_strides, copy.target_strides)
    ]
    into = as_strided(target[copy.target :], copy.extents, steps[1])
    into[...] = as_strided(source, copy.extents, steps[0], writeable=False)
