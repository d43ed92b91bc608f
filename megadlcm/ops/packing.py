"""Packed sequences: several documents laid end to end, told apart by their offsets.

Letters: T tokens of a packed batch, S documents in it, M concepts of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each document of a packed sequence lies, on the device and on the host.

    The host copy exists because every attention back-end needs sizes as Python integers; it is
    made once per sequence level, so that no block has to ask the device again.
    """

    cu_seqlens: Tensor
    """Offsets of the documents, int32 (S+1,), first 0, last the number of rows."""
    bounds: tuple[int, ...]
    """The same offsets on the host."""
    position: Tensor
    """Position of each row inside its document, int64 (rows,)."""

    @property
    def num_rows(self) -> int:
        """Rows of the packed sequence, all documents together."""
        return self.bounds[-1]

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in itertools.pairwise(self.bounds)]

    def document_index(self) -> Tensor:
        """Index of the document that each row belongs to, int64 (rows,)."""
        lengths = self.cu_seqlens.diff().long()
        documents = torch.arange(self.num_documents, device=self.cu_seqlens.device)
        return documents.repeat_interleave(lengths, output_size=self.num_rows)


def packing_from_offsets(cu_seqlens: Tensor, num_rows: int | None = None) -> Packing:
    """Checks the offsets of a packed sequence and derives each row's position.

    Args:
        cu_seqlens: offsets of the documents, integer (S+1,).
        num_rows: rows of the packed sequence; None where only the offsets know.

    Returns:
        The packing, with one copy from the device to the host.

    Raises:
        ValueError: offsets that do not start at 0, do not end at `num_rows`, or name a document
            without rows (its first token would be another document's).
    """
    # the one time that the host waits for the device
    bounds = tuple(cu_seqlens.tolist())
    if len(bounds) < 2 or bounds[0] != 0 or num_rows not in (None, bounds[-1]):
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of rows ({num_rows}), got {_short(bounds)}"
        )
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop <= start:
            raise ValueError(
                f"cu_seqlens names document {index} with {stop - start} rows; "
                "every document needs at least one"
            )
    device = cu_seqlens.device
    lengths = cu_seqlens.diff().long()
    # the size is given: to find it the device would have to be asked again
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=bounds[-1])
    position = torch.arange(bounds[-1], device=device) - starts
    # int32 is what the kernels take
    return Packing(cu_seqlens.to(torch.int32), bounds, position)


def _short(bounds: tuple[int, ...]) -> str:
    return str(list(bounds)) if len(bounds) <= 6 else f"[{bounds[0]}, ..., {bounds[-1]}]"
