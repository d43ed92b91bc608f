"""The seams of a model whose layers are sharded over a tensor parallel group."""

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
from megadlcm.parallel.watch.activity import doing


class DisagreementError(RuntimeError):
    """Processes of a tensor parallel group took different boundary decisions."""


class TensorSeams(Seams):
    """Heads, inner widths and vocabulary are sharded; rows are whole on every process.

    Args:
        group: the tensor parallel group.
        check_agreement: whether boundary decisions are compared before they are replaced by those
            of the first process.
    """

    def __init__(self, group: Group, check_agreement: bool = False) -> None:
        self.group = group
        self.check_agreement = check_agreement

    def to_layer(self, states: Tensor, num_rows: int) -> Tensor:
        return self.copy_to_layer(states)

    def from_layer(self, partial: Tensor) -> Tensor:
        return self.sum_from_layer(partial)

    def copy_to_layer(self, states: Tensor) -> Tensor:
        # no copy of the rows: what differs is their gradient, which is summed over the group
        copied: Tensor = CopyToLayer.apply(states, self.group)
        return copied

    def sum_from_layer(self, partial: Tensor) -> Tensor:
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
        agreed = decisions.to(torch.uint8)  # back-ends differ in whether they send bools
        with doing("tensor parallel broadcast of boundaries"):
            dist.broadcast(agreed, src=dist.get_global_rank(self.group, 0), group=self.group)
        if self.check_agreement:
            self._compare(decisions, agreed.bool())
        return agreed.bool()

    def _compare(self, own: Tensor, agreed: Tensor) -> None:
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        # one entry for each process, so that the sum says who differs and not only that one does
        flipped = torch.zeros(size, dtype=torch.int64, device=own.device)
        flipped[rank] = (own != agreed).sum()
        counts = all_reduce(
            flipped, self.group, "tensor parallel all-reduce of boundary disagreements"
        ).tolist()
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
        what = "tensor parallel all-reduce of the largest logit"
        # it only shifts logits for stability, so that no gradient has to pass
        return all_reduce(values.clone(), self.group, what, dist.ReduceOp.MAX)

    def sum_over_vocabulary(self, values: Tensor) -> Tensor:
        return self.sum_from_layer(values)

    def vocabulary_start(self, part_size: int) -> int:
        return dist.get_rank(self.group) * part_size


class SequenceSeams(TensorSeams):
    """Sequence parallel: norms and residuals run on 1/P of the rows between the layers."""

    def split_rows(self, states: Tensor) -> Tensor:
        # gradients are gathered, not summed: every process had the same whole rows
        kept: Tensor = SplitRows.apply(states, self.group)
        return kept

    def join_rows(self, states: Tensor, num_rows: int) -> Tensor:
        # for what every process computes alike, such as boundaries: each takes back its own rows
        whole: Tensor = JoinRows.apply(states, num_rows, self.group)
        return whole

    def to_layer(self, states: Tensor, num_rows: int) -> Tensor:
        # in front of shards of a layer, whose gradients are different summands
        gathered: Tensor = GatherToLayer.apply(states, num_rows, self.group)
        return gathered

    def from_layer(self, partial: Tensor) -> Tensor:
        kept: Tensor = ReduceFromLayer.apply(partial, self.group)
        return kept


def sum_gradient(group: Group, sequence: bool) -> Any:
    """A hook for parameters that see only part of the heads or rows on each process.

    Args:
        group: the tensor parallel group.
        sequence: whether rows are sharded too, for the message.

    Returns:
        Function of the gradient, for `Tensor.register_hook`.
    """
    what = f"{'sequence' if sequence else 'tensor'} parallel all-reduce of gain gradients"

    def summed(gradient: Tensor) -> Tensor:
        # a copy: autograd may hand the same tensor to somebody else
        return all_reduce(gradient.clone(), group, what)

    return summed
