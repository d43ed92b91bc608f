"""The dense control that costs what a DLCM costs."""

from __future__ import annotations

import dataclasses

from megadlcm.config import ModelConfig
from megadlcm.plan.accounting import flops_per_token

_STEP = 8


def dense_with_equal_flops(config: ModelConfig, seq_len: int) -> ModelConfig:
    """Fits the inner width of a dense model of the same depth and token width.

    Args:
        config: a DLCM at its target compression.
        seq_len: length at which attention is counted, tokens.

    Returns:
        The dense config, a key-value head for each query head, whose forward FLOPs per token are
        nearest to the DLCM's among inner widths that are multiples of 8.
    """
    wanted = flops_per_token(config, seq_len)["total"]

    def with_ffn(size: int) -> ModelConfig:
        return dataclasses.replace(
            config,
            architecture="dense",
            token_kv_heads=config.token_heads,
            token_ffn_size=size,
        )

    sizes = range(_STEP, 16 * config.d_token, _STEP)
    best = min(
        sizes, key=lambda size: abs(flops_per_token(with_ffn(size), seq_len)["total"] - wanted)
    )
    return with_ffn(best)
