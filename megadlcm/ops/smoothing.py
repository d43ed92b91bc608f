"""Causal smoothing of the concepts (DLCM Eq. 11; the moving average of H-Net Eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from megadlcm.config.constants import SMOOTHING_CHUNK
from megadlcm.ops.packing import Packing

MIN_WEIGHT = 1e-4


def exponential_smoothing(concept_MC: Tensor, weight_M: Tensor, packing: Packing) -> Tensor:
    """Moving average z~_k = P_k z_k + (1 - P_k) z~_(k-1), started anew in each document.

    P is clamped to [1e-4, 1 - 1e-4] and is 1 at a document's first concept, exactly, so nothing
    of the previous document remains. Differentiable in both arguments.

    Args:
        concept_MC: concepts (M, C).
        weight_M: P, boundary probability of each concept's boundary (M,).
        packing: the concepts of each document.

    Returns:
        (M, C) in the dtype of `concept_MC`.
    """
    wide = torch.promote_types(concept_MC.dtype, torch.float32)
    weight_M = _clamped(weight_M.to(wide))
    first_M = packing.position == 0
    # exactly 1, after the clamp: 1e-4 of the previous document would be a leak
    weight_M = torch.where(first_M, torch.ones_like(weight_M), weight_M)
    smooth = linear_recurrence(weight_M.unsqueeze(1) * concept_MC.to(wide), 1.0 - weight_M)
    return smooth.to(concept_MC.dtype)


def smoothing_step(concept_1C: Tensor, weight: Tensor, previous_1C: Tensor | None) -> Tensor:
    """The same for the next concept of one document.

    Args:
        concept_1C: z_k (1, C).
        weight: P_k, scalar.
        previous_1C: z~_(k-1), from this function; None at a document's first concept.

    Returns:
        z~_k (1, C) in fp32 or wider: in bf16 a small step would be lost in what is carried on.
    """
    concept_1C = concept_1C.to(torch.promote_types(concept_1C.dtype, torch.float32))
    if previous_1C is None:
        return concept_1C
    weight = _clamped(weight.to(concept_1C.dtype))
    return weight * concept_1C + (1.0 - weight) * previous_1C


def _clamped(weight: Tensor) -> Tensor:
    return weight.clamp(MIN_WEIGHT, 1.0 - MIN_WEIGHT)


def linear_recurrence(input_MC: Tensor, decay_M: Tensor) -> Tensor:
    """Solves y_k = x_k + a_k y_(k-1) with y_(-1) = 0, in chunks instead of M steps.

    Inside a chunk y = W x with W[k, i] = a_(i+1) ... a_k, one small matrix product. What enters a
    chunk from the one before obeys the same recurrence over chunks, so it is solved by this
    function again. The products of decays are taken in logarithms, in fp64: they are scalars.

    Args:
        input_MC: x (M, C).
        decay_M: a in [0, 1] (M,); 0 cuts the recurrence.

    Returns:
        y (M, C).
    """
    num_rows, width = input_MC.shape
    # filled up with zeros, which nothing before them sees
    num_chunks = -(-num_rows // SMOOTHING_CHUNK)
    padding = num_chunks * SMOOTHING_CHUNK - num_rows
    x_GKC = torch.nn.functional.pad(input_MC, (0, 0, 0, padding)).view(
        num_chunks, SMOOTHING_CHUNK, width
    )
    a_GK = torch.nn.functional.pad(decay_M, (0, padding)).view(num_chunks, SMOOTHING_CHUNK)
    product_GKK = _decay_products(a_GK)
    within_GKC = product_GKK.to(input_MC.dtype) @ x_GKC
    if num_chunks > 1:
        # the carry reaches row k times a_0 ... a_k, which is column 0 of W times a_0
        reach_GK = (product_GKK[:, :, 0] * a_GK[:, :1].double()).to(input_MC.dtype)
        # 64 times fewer rows: two or three levels for any batch
        state_GC = linear_recurrence(within_GKC[:, -1], reach_GK[:, -1])
        carry_GC = torch.nn.functional.pad(state_GC[:-1], (0, 0, 1, 0))
        within_GKC = within_GKC + reach_GK.unsqueeze(-1) * carry_GC.unsqueeze(1)
    return within_GKC.reshape(-1, width)[:num_rows]


def _decay_products(a_GK: Tensor) -> Tensor:
    """W[g, k, i] = a[g, i+1] ... a[g, k] for i <= k, else 0; fp64 (G, K, K)."""
    a_GK = a_GK.double()
    # a decay of 0 has no logarithm: it is counted instead, and rows on both sides are not linked
    cut_GK = a_GK == 0
    log_sum_GK = torch.where(cut_GK, torch.ones_like(a_GK), a_GK).log().cumsum(1)
    # equal counts: no cut lies between the two rows
    num_cuts_GK = cut_GK.long().cumsum(1)
    difference = log_sum_GK.unsqueeze(2) - log_sum_GK.unsqueeze(1)
    # masked by -inf before exp and not by 0 after it: above the diagonal exp may overflow
    lower = torch.ones(a_GK.shape[1], a_GK.shape[1], dtype=torch.bool, device=a_GK.device).tril()
    linked = lower & (num_cuts_GK.unsqueeze(2) == num_cuts_GK.unsqueeze(1))
    return torch.where(linked, difference, torch.full_like(difference, -torch.inf)).exp()
