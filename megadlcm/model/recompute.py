"""Activation recomputation of one block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, mode: str, *inputs: Any) -> Tensor:
    """Runs a block, keeping for backward what the mode says."""
    if mode == "none":
        states: Tensor = block(*inputs)
        return states
    # no block draws random numbers, so there is no generator state to keep
    recomputed: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return recomputed
