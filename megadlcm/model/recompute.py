"""Activation recomputation of one block: what forward keeps for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megadlcm.config.kernels import ATTENTION_BACKENDS

_MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.linear.default,
}
# of every back-end, not only of the one in use: the names of one mean nothing to another
_ATTENTION = tuple(
    name for backend in ATTENTION_BACKENDS.values() for name in backend.kept_operators
)


def run_block(block: nn.Module, mode: str, *inputs: Any) -> Tensor:
    """Runs a block and keeps for its backward pass what the mode says.

    No block draws random numbers, so there is no generator state to keep; boundaries are computed
    outside of every block and come in with the packing, so they are never drawn twice.

    Args:
        block: the block.
        mode: `none` keeps everything; `block` keeps the inputs and runs the block again;
            `selective` also keeps what matrix products and attention made, and runs only the rest
            again: norms, rotations, products of elements, and the sums of a tensor parallel group.
        inputs: arguments of the block.

    Returns:
        What the block returns.
    """
    if mode == "none":
        states: Tensor = block(*inputs)
        return states
    contexts: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}
    # not reentrant: only so may contexts choose what is kept
    recomputed: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts
    )
    return recomputed


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    make: Callable[..., Any] = create_selective_checkpoint_contexts
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = make(_policy)
    return contexts


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_kept(operator: Any) -> bool:
    return operator in _MATRIX_PRODUCTS or str(operator).startswith(_ATTENTION)
