"""The ratio loss that steers the number of concepts (DLCM Eq. 8-10, the Global Parser)."""

from __future__ import annotations

import torch
from torch import Tensor


def ratio_loss(boundary_fraction: Tensor, mean_boundary_prob: Tensor, target: float) -> Tensor:
    """L_aux = R/(R-1) * [(R-1) F G + (1-F)(1-G)] - 1.

    Zero at F = G = 1/R; it may be negative and is not a distance (bilinear in F and G).

    Args:
        boundary_fraction: F, boundaries per token over the whole batch.
        mean_boundary_prob: G, mean boundary probability over the same tokens.
        target: R, tokens per concept, above 1.

    Returns:
        Scalar (or the common shape of F and G).
    """
    fraction, prob = boundary_fraction, mean_boundary_prob
    # bilinear: at F = G = 1/R both terms add up to (R - 1) / R, so the loss is 0 there
    product = (target - 1.0) * fraction * prob + (1.0 - fraction) * (1.0 - prob)
    return target / (target - 1.0) * product - 1.0


def ratio_gradient_scale(boundary_fraction: Tensor, target: float) -> Tensor:
    """dL_aux/dG = R (R F - 1) / (R - 1): the only gradient that the ratio loss has.

    F counts decisions and carries no gradient, so every token's p gets this same number over the
    number of tokens: positive (fewer boundaries) when there are too many.

    Args:
        boundary_fraction: F, any shape.
        target: R, above 1.

    Returns:
        Same shape as F, detached.
    """
    return (target * (target * boundary_fraction.detach() - 1.0) / (target - 1.0)).to(
        torch.promote_types(boundary_fraction.dtype, torch.float32)
    )
