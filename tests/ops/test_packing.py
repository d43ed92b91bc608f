"""Offsets of packed documents (peers' list 12)."""

from __future__ import annotations

import pytest
import torch

from megadlcm.ops.packing import packing_from_offsets


def test_positions_restart_in_each_document() -> None:
    """Host copy, positions and lengths of three documents."""
    packing = packing_from_offsets(torch.tensor([0, 3, 4, 9]), 9)
    assert packing.position.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert packing.document_index().tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert packing.bounds == (0, 3, 4, 9)
    assert packing.lengths == [3, 1, 5]
    assert (packing.num_rows, packing.num_documents, packing.max_seqlen) == (9, 3, 5)
    assert packing.cu_seqlens.dtype == torch.int32


def test_offsets_alone_say_how_many_rows_there_are() -> None:
    """Concepts are packed like that: their number is only on the device."""
    packing = packing_from_offsets(torch.tensor([0, 3, 4]))
    assert (packing.num_rows, packing.position.tolist()) == (4, [0, 1, 2, 0])
    with pytest.raises(ValueError, match="must run from 0"):
        packing_from_offsets(torch.tensor([1, 3]))


@pytest.mark.parametrize("offsets", [[0, 2, 2, 5], [0, 0, 5], [0, 5, 5], [0, 3, 1, 5]])
def test_a_document_without_rows_is_named(offsets: list[int]) -> None:
    """Peers' list 12: a clear error instead of another document's first token."""
    empty = next(index for index in range(9) if offsets[index + 1] <= offsets[index])
    with pytest.raises(ValueError, match=f"document {empty} with .* rows; every document needs"):
        packing_from_offsets(torch.tensor(offsets, dtype=torch.int32), 5)


@pytest.mark.parametrize("offsets", [[], [0], [1, 5], [0, 4], [0, 6], list(range(9))])
def test_offsets_must_span_the_rows(offsets: list[int]) -> None:
    """The message names both ends."""
    with pytest.raises(ValueError, match=r"must run from 0 to the number of rows \(5\)"):
        packing_from_offsets(torch.tensor(offsets, dtype=torch.int32), 5)
