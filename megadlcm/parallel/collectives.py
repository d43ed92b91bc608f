"""Communication inside a layer, with gradients. Letters: T rows, D width, P processes of a group.

Each function names itself to the watch, so that a process that waits for ever can say for what.
Two kinds of tensors meet here. A *whole* tensor is the same on every process, and so is its
gradient. A *partial* tensor is one summand of P, and the gradient of each summand is that of the
sum. Copying a whole tensor into P layers makes P different gradients, whose sum is the right one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megadlcm.parallel.watch.activity import doing

Group = dist.ProcessGroup


def all_reduce(
    values: Tensor, group: Group | None, what: str, op: Any = dist.ReduceOp.SUM
) -> Tensor:
    """Reduces a tensor over a group in place.

    Args:
        values: the tensor; changed.
        group: the processes.
        what: name of the collective, for messages about processes that do not come.
        op: sum by default.

    Returns:
        The same tensor.
    """
    with doing(what):
        dist.all_reduce(values, op=op, group=group)
    return values


def gather_rows(rows: Tensor, num_rows: int, group: Group, what: str) -> Tensor:
    """Joins the rows of all processes and drops the filling; without a gradient."""
    size = dist.get_world_size(group)
    whole = rows.new_empty(rows.shape[0] * size, *rows.shape[1:])
    with doing(what):
        dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
    return whole[:num_rows]


def own_rows(whole: Tensor, group: Group) -> Tensor:
    """This process's rows of a whole tensor, filled up with zeros to equal parts; no gradient."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part = rows_of_part(whole.shape[0], size)
    return _filled(whole, part * size)[rank * part : (rank + 1) * part]


def reduce_rows(partial: Tensor, group: Group, what: str) -> Tensor:
    """Sums partial tensors and keeps this process's rows; without a gradient."""
    size = dist.get_world_size(group)
    part = rows_of_part(partial.shape[0], size)
    # the collective takes equal parts only; the zeros are dropped again by `gather_rows`
    filled = _filled(partial, part * size).contiguous()
    kept = filled.new_empty(part, *filled.shape[1:])
    with doing(what):
        dist.reduce_scatter_tensor(kept, filled, group=group)
    return kept


def rows_of_part(num_rows: int, size: int) -> int:
    """Rows of each of `size` equal parts, the last one filled up."""
    return -(-num_rows // size)


def _filled(rows: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


class CopyToLayer(torch.autograd.Function):
    """Whole -> the input of P layers; their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # a copy: autograd may hand the same tensor to somebody else
        summed = gradient.clone(memory_format=torch.contiguous_format)
        return all_reduce(summed, ctx.group, "tensor parallel all-reduce of gradients"), None


class SumFromLayer(torch.autograd.Function):
    """Partial -> whole."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        # a copy: whoever made the summand may need it for its own backward pass
        summed = partial.clone(memory_format=torch.contiguous_format)
        return all_reduce(summed, group, "tensor parallel all-reduce")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # not divided by P: the sum has the same slope in each of its summands
        return gradient, None


class GatherToLayer(torch.autograd.Function):
    """Kept rows -> the whole input of P layers; their gradients are summed and shared out."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, group: Group) -> Tensor:
        ctx.group = group
        return gather_rows(rows, num_rows, group, "sequence parallel all-gather")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (
            reduce_rows(gradient, ctx.group, "sequence parallel reduce-scatter of gradients"),
            None,
            None,
        )


class ReduceFromLayer(torch.autograd.Function):
    """Partial -> the kept rows of the sum."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.num_rows = group, partial.shape[0]
        return reduce_rows(partial, group, "sequence parallel reduce-scatter")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        what = "sequence parallel all-gather of gradients"
        return gather_rows(gradient, ctx.num_rows, ctx.group, what), None


class SplitRows(torch.autograd.Function):
    """Whole -> kept rows; the gradient is whole again."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.num_rows = group, whole.shape[0]
        return own_rows(whole, group).clone()  # a view would keep all rows alive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        what = "sequence parallel all-gather of gradients"
        return gather_rows(gradient, ctx.num_rows, ctx.group, what), None


class JoinRows(torch.autograd.Function):
    """Kept rows -> whole; the gradient is whole, and this process takes its rows of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, group: Group) -> Tensor:
        ctx.group = group
        return gather_rows(rows, num_rows, group, "sequence parallel all-gather")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return own_rows(gradient, ctx.group).clone(), None, None
