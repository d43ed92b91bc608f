"""Counter-based random numbers: a draw is a function of its key and its index, of nothing else.

The same token gets the same draw on every layout, after every restart, and when a block is
recomputed; and the draw of one token never depends on how many tokens follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def uniform(seed: int, step: int, index_T: Tensor) -> Tensor:
    """Draws one number in [0, 1) for each index.

    The generator is SplitMix64 (Steele, Lea and Flood, 2014) used as a hash: the key is mixed
    from `seed` and `step`, then each index is a counter under that key. The top 24 bits become
    the fraction, so each value is exact in fp32.

    Args:
        seed: seed of the run.
        step: optimizer step.
        index_T: counters, int64 of any shape.

    Returns:
        fp32 tensor of the same shape and device.
    """
    key = _mix_int((_mix_int(seed & _MASK) + step * _GOLDEN) & _MASK)
    state_T = index_T * _signed(_GOLDEN) + _signed(key)
    return (_shift_right(_mix(state_T), 40)).to(torch.float32) * 2.0**-24


def _mix(value: Tensor) -> Tensor:
    # int64 multiplication wraps around, which is the arithmetic modulo 2^64 that the hash needs
    value = (value ^ _shift_right(value, 30)) * _signed(_MULTIPLIER_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MULTIPLIER_2)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; masking the sign bits off makes it a logical shift
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
