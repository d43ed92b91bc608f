"""The file of one process: its slices, one after another, from where they live or from a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megadlcm.checkpoint.fingerprint import fingerprint
from megadlcm.checkpoint.format import MASTER, FileEntry, rank_file_header
from megadlcm.checkpoint.index import Range, Shape
from megadlcm.checkpoint.slices import Slice

_CHUNK_ELEMENTS = 1 << 20
"""Of which fingerprints are taken and which are copied from a device at a time."""
_HEADER_ROOM = 1 << 16
"""Before the values of a copy; a header ends there."""
Fingerprints = dict[str, list[int]]


@dataclass
class Report:
    """What a process says of its file."""

    entry: FileEntry | None = None
    """None where it holds nothing."""
    fingerprints: Fingerprints = field(default_factory=dict)
    """Of its slices, by tensor: master, then each kind of state."""
    optimizer_step: int | None = None
    """What its optimizer counts; None where it has no state."""


def array_sizes(slices: Sequence[Slice], keys: Sequence[str]) -> dict[str, int]:
    """Elements of the arrays of a file; buffers have masters only."""
    lengths = [{key: len(each.part) for key in each.views} for each in slices]
    return {key: sum(own.get(key, 0) for own in lengths) for key in (MASTER, *keys)}


def contents(
    slices: Sequence[Slice],
    keys: Sequence[str],
    shapes: Mapping[str, Shape],
    fingerprints: Fingerprints,
) -> Iterator[memoryview | bytes]:
    """The bytes of a file from the tensors themselves, which nobody may change meanwhile.

    Args:
        slices: what this process saves.
        keys: kinds of optimizer state.
        shapes: of whole tensors, by name.
        fingerprints: filled while the values are in the cache.
    """
    yield rank_file_header(array_sizes(slices, keys))
    for key in (MASTER, *keys):
        for each in slices:
            if key in each.views:
                for values in fingerprinted(each, key, keys, shapes, fingerprints):
                    yield values.data.cast("B")


def fingerprinted(
    each: Slice,
    key: str,
    keys: Sequence[str],
    shapes: Mapping[str, Shape],
    fingerprints: Fingerprints,
) -> Iterator[NDArray[Any]]:
    """The values of a slice in parts; adds up their fingerprint."""
    name, view = each.part.tensor, each.views[key]
    sums = fingerprints.setdefault(name, [0] * (1 + len(keys)))
    column = (MASTER, *keys).index(key)
    for start in range(0, view.numel(), _CHUNK_ELEMENTS):
        chunk = view[start : start + _CHUNK_ELEMENTS]
        assert chunk.dtype == torch.float32
        values = chunk.cpu().numpy()
        first = each.part.start + start
        part = Range(name, each.part.piece, first, first + len(values))
        sums[column] = (sums[column] + fingerprint(values, part, shapes[name])) % 2**64
        yield values


def take_fingerprints(
    slices: Sequence[Slice], keys: Sequence[str], shapes: Mapping[str, Shape]
) -> Fingerprints:
    """Fingerprints of slices by tensor: of the master, then of each kind of state."""
    found: Fingerprints = {}
    for each in slices:
        for key in each.views:
            for _ in fingerprinted(each, key, keys, shapes, found):
                pass
    return found


def add_fingerprints(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Adds what processes computed of their slices."""
    total: Fingerprints = {}
    for part in parts:
        for name, sums in part.items():
            before = total.setdefault(name, [0] * len(sums))
            total[name] = [(a + b) % 2**64 for a, b in zip(before, sums, strict=True)]
    return total


def as_text(fingerprints: Fingerprints) -> dict[str, list[str]]:
    """Fingerprints as the manifest has them."""
    return {name: [f"{value:016x}" for value in sums] for name, sums in fingerprints.items()}


class Staging:
    """A copy of the slices on the host, laid out as the file, for as long as the run lasts.

    Args:
        elements: fp32 values that the slices and their optimizer state have in all.
        device: where the slices are.

    Raises:
        MemoryError: there is no room for it; the message says how much it takes.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.num_bytes = _HEADER_ROOM + 4 * elements
        on_gpu = device.type == "cuda"
        try:
            # written to, so that a machine without the room says so now and not at a save
            self._bytes = torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        except RuntimeError as error:
            raise MemoryError(
                f"checkpoint.async: no room on the host for a copy of what this process saves "
                f"({self.num_bytes:,} bytes): set checkpoint.async=false, or start fewer processes "
                "on a node"
            ) from error
        # beside the stream of the training, which goes on meanwhile
        self._stream = torch.cuda.Stream(device) if on_gpu else None

    def copy(
        self, slices: Sequence[Slice], keys: Sequence[str]
    ) -> tuple[list[Slice], memoryview, Callable[[], None]]:
        """Lays the slices out, without copying yet.

        Returns:
            The slices of the copy, the bytes of the file, and what makes the copy.
        """
        sizes = array_sizes(slices, keys)
        header = rank_file_header(sizes)
        begin = _HEADER_ROOM - len(header)
        self._bytes[begin:_HEADER_ROOM] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        values = self._bytes[_HEADER_ROOM:].view(torch.float32)
        copies: list[dict[str, Tensor]] = [{} for _ in slices]
        place = 0
        for key in (MASTER, *keys):
            for each, own in zip(slices, copies, strict=True):
                if key in each.views:
                    own[key] = values[place : place + len(each.part)]
                    place += len(each.part)
        staged = [Slice(each.part, own) for each, own in zip(slices, copies, strict=True)]
        whole = self._bytes.numpy().data[begin : _HEADER_ROOM + 4 * place]

        def run() -> None:
            self._copy(slices, staged)

        return staged, whole, run

    def _copy(self, slices: Sequence[Slice], staged: Sequence[Slice]) -> None:
        pairs = [
            (each.views[key], copy.views[key])
            for each, copy in zip(slices, staged, strict=True)
            for key in each.views
        ]
        if self._stream is None:
            for source, target in pairs:
                np.copyto(target.numpy(), source.numpy())  # lets other threads go on
            return
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def follow(self) -> None:
        """Has the copy wait for what the calling thread has asked of the device until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
