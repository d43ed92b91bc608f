"""Boundary scores and decisions (DLCM Eq. 5-6; sharpening from ConceptMoE Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megadlcm.ops.random import uniform

NUM_PROBABILITY_BINS = 16384


@dataclass(frozen=True)
class BoundarySampling:
    """Names the random draws of one packed batch in training."""

    seed: int
    """Seed of the run."""
    step: int
    """Optimizer step, counted from 0."""
    token_index_T: Tensor
    """Index of each token in the global batch, int64 (T,)."""


def neighbour_cosine(query_TD: Tensor, key_TD: Tensor) -> Tensor:
    """Cosine between the query of each token's predecessor and its own key.

    cos_t = <q_(t-1), k_t> / (|q_(t-1)| |k_t|) (Eq. 6), in fp32 or wider: bf16 flips one decision
    in two hundred. Row 0 is 0; rows that start a document hold a value that the caller replaces.

    Args:
        query_TD: queries (T, D).
        key_TD: keys (T, D).

    Returns:
        (T,), fp32 (fp64 for fp64 input).
    """
    wide = torch.promote_types(query_TD.dtype, torch.float32)
    # normalised first: the product of two tiny lengths would underflow
    query_TD = F.normalize(query_TD.to(wide), dim=-1)
    key_TD = F.normalize(key_TD.to(wide), dim=-1)
    # over the whole pack: the caller overwrites the pairs that span two documents
    cosine = (query_TD[:-1] * key_TD[1:]).sum(-1)
    return F.pad(cosine, (1, 0))


def boundary_probability(
    cosine_T: Tensor, position_T: Tensor, offset: Tensor | float = 0.0
) -> Tensor:
    """Dissimilarity of neighbours as a probability: p_t = clamp((1 - cos_t + offset) / 2, 0, 1).

    The first token of a document has p = 1 (it has no predecessor, and the previous document
    must not be one). `offset` is 0 in the paper; see `BoundaryDetector.calibrate`.

    Args:
        cosine_T: neighbour cosines (T,).
        position_T: places of the tokens in their documents, int64 (T,).
        offset: scalar added to the dissimilarity.

    Returns:
        (T,) in the dtype of `cosine_T`.
    """
    prob_T = ((1.0 - cosine_T + offset) / 2).clamp(0.0, 1.0)
    return torch.where(position_T == 0, torch.ones_like(prob_T), prob_T)


def sharpen(prob_T: Tensor, sharpening: float) -> Tensor:
    """Moves a probability towards the decision that thresholding would take.

    p^(1/a) for p >= 0.5, 1 - (1-p)^(1/a) below (ConceptMoE Eq. 5). a = 1 changes nothing and
    a -> infinity is the hard threshold; a = 6 flips about one decision in twenty.

    Args:
        prob_T: probabilities, any shape.
        sharpening: a, at least 1.

    Returns:
        Same shape and dtype.
    """
    # both branches meet the same ends: 0, 1, and a jump at 0.5
    power = 1.0 / sharpening
    return torch.where(prob_T >= 0.5, prob_T**power, 1.0 - (1.0 - prob_T) ** power)


def sample_boundaries(
    prob_T: Tensor,
    sharpening: float,
    sampling: BoundarySampling,
    position_T: Tensor,
    balance: Tensor | None = None,
) -> Tensor:
    """Draws b_t ~ Bernoulli(sharpen(p_t)), one counter-based draw for each token.

    With a balance kappa, tokens below 0.5 rise with min(kappa, 1) sharpen(p_t), and those above it
    fall with min(1 / kappa, 1) (1 - sharpen(p_t)).

    Args:
        prob_T: boundary probabilities (T,).
        sharpening: see `sharpen`.
        sampling: names the draws.
        position_T: places of the tokens; 0 is a boundary whatever is drawn.
        balance: kappa, scalar, from `draw_balance`; None draws as the sharpened p says.

    Returns:
        bool (T,).
    """
    draw_T = uniform(sampling.seed, sampling.step, sampling.token_index_T)
    prob_T = prob_T.detach()
    sharp_T = sharpen(prob_T, sharpening)
    if balance is not None:
        falling_T = 1.0 - (1.0 - sharp_T) * (1.0 / balance).clamp(max=1.0)
        sharp_T = torch.where(prob_T >= 0.5, falling_T, sharp_T * balance.clamp(max=1.0))
    return (draw_T < sharp_T) | (position_T == 0)


def draw_balance(histogram: Tensor, sharpening: float) -> float | None:
    """Computes by how much fewer decisions fall below the threshold than rise above it.

    kappa = sum over p >= 0.5 of (1 - sharpen(p)) / sum over p < 0.5 of sharpen(p), expected counts
    of both. Below 1 where boundaries are rarer than other tokens.

    Args:
        histogram: counts in equal bins over [0, 1], integer (bins,).
        sharpening: see `sharpen`.

    Returns:
        kappa, in [0.001, 1000]; None where no decision can flip.
    """
    counts = histogram.double()
    middle = (torch.arange(counts.numel(), device=counts.device) + 0.5) / counts.numel()
    sharp = sharpen(middle.double(), sharpening)
    above = middle >= 0.5
    falling = float((counts * (1.0 - sharp))[above].sum())
    rising = float((counts * sharp)[~above].sum())
    if falling + rising == 0.0:
        return None
    # bounded: an average over steps must be able to come back from it
    return min(max(falling / max(rising, 1e-9), 1e-3), 1e3)


def threshold_boundaries(
    prob_T: Tensor, position_T: Tensor, threshold: Tensor | float = 0.5
) -> Tensor:
    """Decides b_t = [p_t >= threshold]; a tie is a boundary, in training, evaluation and decoding.

    Args:
        prob_T: boundary probabilities (T,).
        position_T: places of the tokens; 0 is a boundary.
        threshold: 0.5, or a tracked quantile of p.

    Returns:
        bool (T,).
    """
    return (prob_T.detach() >= threshold) | (position_T == 0)


def fixed_boundaries(position: Tensor, tokens_per_concept: float) -> Tensor:
    """Places a boundary every `tokens_per_concept` tokens of a document.

    b_t = [floor(t / R) > floor((t-1) / R)], so that R need not be an integer.

    Args:
        position: places of tokens in their documents, int64, any shape.
        tokens_per_concept: R, at least 1.

    Returns:
        bool, same shape; true at position 0.
    """
    # a tensor on the device: some devices divide by a plain number as a product with 1 / R, which
    # puts other tokens at the boundaries
    ratio = torch.full((), tokens_per_concept, dtype=torch.float64, device=position.device)
    # position -1 comes before every multiple, so that position 0 is a boundary
    before, after = ((position - shift).double().div(ratio).floor() for shift in (1, 0))
    return after > before


def limit_segments(mask_T: Tensor, max_tokens: int) -> Tensor:
    """Adds a boundary wherever `max_tokens` tokens have passed since the last one.

    The added boundary at t depends on boundaries at or before t only, so it is causal.

    Args:
        mask_T: boundaries, bool (T,), true at each document start.
        max_tokens: longest distance between boundaries, at least 2.

    Returns:
        bool (T,).
    """
    index_T = torch.arange(mask_T.numel(), device=mask_T.device)
    last_T = torch.where(mask_T, index_T, torch.zeros_like(index_T)).cummax(0).values
    # a multiple, and not only the first one: what is forced does not show in `last_T`
    return mask_T | ((index_T - last_T) % max_tokens == 0)


def probability_histogram(prob_T: Tensor, position_T: Tensor) -> Tensor:
    """Counts the probabilities of tokens that have a predecessor, in equal bins over [0, 1].

    Args:
        prob_T: probabilities (T,).
        position_T: places of the tokens; document starts are left out.

    Returns:
        int64 (NUM_PROBABILITY_BINS,).
    """
    # what is not finite is counted somewhere: it is for the loss to say so
    prob_T = torch.nan_to_num(prob_T.detach())
    bins_T = (prob_T * NUM_PROBABILITY_BINS).long().clamp_(0, NUM_PROBABILITY_BINS - 1)
    # integers: a GPU adds them in any order with one result
    counts = torch.zeros(NUM_PROBABILITY_BINS, dtype=torch.int64, device=prob_T.device)
    return counts.scatter_add_(0, bins_T, (position_T > 0).long())


def histogram_quantile(histogram: Tensor, share_above: float) -> Tensor:
    """Finds the value that leaves `share_above` of the counted probabilities at or above it.

    Args:
        histogram: counts in equal bins over [0, 1], integer (bins,).
        share_above: wanted share, in (0, 1).

    Returns:
        fp32 scalar, interpolated inside its bin.
    """
    counts = histogram.double()
    above = counts.flip(0).cumsum(0).flip(0)
    wanted = share_above * counts.sum()
    # `above` falls, so the bins that still leave enough come first
    bin_index = max(int((above >= wanted).sum()) - 1, 0) if counts.any() else 0
    inside = counts[bin_index].clamp(min=1.0)
    fraction = ((above[bin_index] - wanted) / inside).clamp(0.0, 1.0)
    return ((bin_index + fraction) / histogram.numel()).to(torch.float32)


def histogram_share(histogram: Tensor, value: float) -> float:
    """Finds the share of the counted probabilities at or above `value`; see `histogram_quantile`.

    Args:
        histogram: counts in equal bins over [0, 1], integer (bins,), not all 0.
        value: in [0, 1].

    Returns:
        The share, interpolated inside the bin of `value`.
    """
    counts = histogram.double()
    place = value * counts.numel()
    bin_index = min(max(int(place), 0), counts.numel() - 1)
    above = counts[bin_index + 1 :].sum() + (bin_index + 1 - place) * counts[bin_index]
    return float(above / counts.sum())
