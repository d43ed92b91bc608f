"""Rotary position embedding from integer positions (Su et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotation of each row, (rows, 1, H/2)."""

    cosine: Tensor
    sine: Tensor


def rotation(position: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/H), computed in fp32 or wider and stored in `dtype`.

    Args:
        position: positions inside the document, int64 (rows,).
        head_size: H, even.
        theta: base of the wavelengths.
        dtype: type of the states that will be rotated.

    Returns:
        The rotation of each row.
    """
    wide = torch.promote_types(dtype, torch.float32)
    # an error of a frequency is multiplied by the position: it is made in fp64
    exponent = torch.arange(0, head_size, 2, device=position.device, dtype=torch.float64)
    frequency = (theta ** (-exponent / head_size)).to(wide)
    angle = position.to(wide).unsqueeze(1) * frequency
    return Rotation(angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1))


def rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the two halves of each head against each other.

    Args:
        states: (rows, heads, H).
        rotation: of the same rows.

    Returns:
        Same shape.
    """
    # halves and not neighbours, as in the Hugging Face format of LLaMA
    first, second = states.chunk(2, dim=-1)
    cosine, sine = rotation.cosine, rotation.sine
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
