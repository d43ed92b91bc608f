"""The seams of a model whose layers are cut over the processes of a tensor parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.model.seams import Seams
from megadlcm.parallel.collectives import (
    CopyToLayer,
    GatherToLayer,
    Group,
    JoinRows,
    ReduceFromLayer,
    SplitRows,
    SumFromLayer,
    all_reduce,
)
from megadlcm.parallel.watch.watchdog import doing


class DisagreementError(RuntimeError):
    """Processes of a tensor parallel group took different boundary decisions."""


class TensorSeams(Seams):
    """Heads, inner widths and vocabulary are cut; rows are whole on every process.

    Args:
        group: the tensor parallel group.
        check_agreement: whether boundary decisions are compared before they are replaced by those
            of the first process.
    """

    def __init__(self, group: Group, check_agreement: bool = False) -> None:
        self.group = group
        self.check_agreement = check_agreement

    def to_layer(self, states: Tensor, num_rows: int) -> Tensor:
        """Copies whole rows into the cut layers."""
        return self.copy_to_layer(states)

    def from_layer(self, partial: Tensor) -> Tensor:
        """Sums what the cut layers made."""
        return self.sum_from_layer(partial)

    def copy_to_layer(self, states: Tensor) -> Tensor:
        """Copies whole rows into the cut layers."""
        copied: Tensor = CopyToLayer.apply(states, self.group)
        return copied

    def sum_from_layer(self, partial: Tensor) -> Tensor:
        """Sums what the cut layers made."""
        summed: Tensor = SumFromLayer.apply(partial, self.group)
        return summed

    def agree(self, decisions: Tensor) -> Tensor:
        """Takes the decisions of the first process of the group.

        Every process computes them from the same bits and should find the same. A kernel that
        rounds differently on one device would flip one of them some day, the shapes would differ,
        and the group would hang; a byte for each token makes that impossible.

        Args:
            decisions: bool, any shape.

        Returns:
            The same on every process.

        Raises:
            DisagreementError: `check_agreement`, and a process had decided otherwise.
        """
        agreed = decisions.to(torch.uint8)
        with doing("tensor parallel broadcast of boundaries"):
            dist.broadcast(agreed, src=dist.get_global_rank(self.group, 0), group=self.group)
        if self.check_agreement:
            self._compare(decisions, agreed.bool())
        return agreed.bool()

    def _compare(self, own: Tensor, agreed: Tensor) -> None:
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        flipped = torch.zeros(size, dtype=torch.int64, device=own.device)
        flipped[rank] = (own != agreed).sum()
        counts = all_reduce(flipped, self.group, "comparison of boundaries").tolist()
        if any(counts):
            ranks = [dist.get_global_rank(self.group, index) for index in range(size)]
            listed = ", ".join(
                f"rank {ranks[index]} in {count} decisions"
                for index, count in enumerate(counts)
                if count
            )
            raise DisagreementError(
                f"parallel.check_agreement: {listed} differ from rank {ranks[0]}; their hidden "
                "states or their kernels are not the same"
            )

    def max_over_vocabulary(self, values: Tensor) -> Tensor:
        """Largest value over the parts of the vocabulary."""
        what = "tensor parallel maximum of logits"
        return all_reduce(values.clone(), self.group, what, dist.ReduceOp.MAX)

    def sum_over_vocabulary(self, values: Tensor) -> Tensor:
        """Sum over the parts of the vocabulary."""
        return self.sum_from_layer(values)

    def vocabulary_start(self, part_size: int) -> int:
        """First token id of this process's part."""
        return dist.get_rank(self.group) * part_size


class SequenceSeams(TensorSeams):
    """Also cuts the rows: norms and residuals run on 1/P of them between the layers."""

    def split_rows(self, states: Tensor) -> Tensor:
        """Keeps this process's rows."""
        kept: Tensor = SplitRows.apply(states, self.group)
        return kept

    def join_rows(self, states: Tensor, num_rows: int) -> Tensor:
        """Gathers all rows."""
        whole: Tensor = JoinRows.apply(states, num_rows, self.group)
        return whole

    def to_layer(self, states: Tensor, num_rows: int) -> Tensor:
        """Gathers all rows into the cut layers."""
        gathered: Tensor = GatherToLayer.apply(states, num_rows, self.group)
        return gathered

    def from_layer(self, partial: Tensor) -> Tensor:
        """Sums what the cut layers made and keeps this process's rows."""
        kept: Tensor = ReduceFromLayer.apply(partial, self.group)
        return kept


def sum_gradient(group: Group, sequence: bool) -> Any:
    """A hook for parameters that see only part of the heads or rows on each process.

    Args:
        group: the tensor parallel group.
        sequence: whether rows are cut, for the message.

    Returns:
        Function of the gradient, for `Tensor.register_hook`.
    """
    what = "sequence parallel sum of gains" if sequence else "tensor parallel sum of gains"

    def summed(gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone(), group, what)

    return summed
