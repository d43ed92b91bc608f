"""From tokens to concepts and back: boundary detector, concept pool, concept reader.

Letters: T tokens, M concepts, D d_token, C d_concept, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadlcm.config import ModelConfig
from megadlcm.config.model import LEARNED_MODES
from megadlcm.model.seams import WHOLE, Seams
from megadlcm.model.transformer import Linear, RMSNorm
from megadlcm.ops.attention import concept_attention
from megadlcm.ops.boundary import (
    BoundarySampling,
    boundary_probability,
    fixed_boundaries,
    histogram_quantile,
    limit_segments,
    neighbour_cosine,
    sample_boundaries,
    threshold_boundaries,
)
from megadlcm.ops.packing import Packing
from megadlcm.ops.rotary import rotate, rotation
from megadlcm.ops.segments import ConceptLayout, segment_mean
from megadlcm.ops.smoothing import exponential_smoothing

_THRESHOLD_MOMENTUM = 0.9


@dataclass(frozen=True)
class BoundaryOutput:
    """What the detector says of each token."""

    prob_T: Tensor
    """Boundary probability p, fp32 or wider (T,)."""
    mask_T: Tensor
    """Boundary decision b, bool (T,)."""
    threshold_mask_T: Tensor
    """The decision that evaluation would take, bool (T,)."""


class WideLinear(Linear):
    """A matrix that computes in the type of its input, whatever its own.

    A module of its own because ZeRO 3 gathers the parameters of a module around its calls.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(T, D) to (T, size)."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


class BoundaryDetector(nn.Module):
    """p_t = (1 - cos(W_q h_(t-1), W_k h_t)) / 2 and the decision taken from it (Eq. 5-6).

    Everything runs in fp32 whatever the precision of the model. W_q and W_k start as the same
    matrix with orthonormal rows (the identity when they are square), so that training begins with
    the plain cosine of neighbours; two independent random matrices would destroy it.
    """

    offset: Tensor
    threshold: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.boundary_size or config.d_token
        learned = config.boundary_mode in LEARNED_MODES
        self.w_q = WideLinear(config.d_token, size) if learned else None
        self.w_k = WideLinear(config.d_token, size) if learned else None
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.reset_buffers()
        self.seams: Seams = WHOLE

    def reset_buffers(self) -> None:
        """Sets offset and threshold to what a fresh run starts with."""
        fixed = 0.5 if self.config.rule_threshold is None else self.config.rule_threshold
        self.offset.zero_()
        self.threshold.fill_(fixed if self.config.boundary_mode == "rule" else 0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoundaryDetector:
        # a model cast to bf16 must not round these two numbers: follow the device, keep the type
        kept = (self.offset, self.threshold)
        super()._apply(fn, recurse)
        for name, value in zip(("offset", "threshold"), kept, strict=True):
            moved = getattr(self, name)
            if moved.dtype != value.dtype and not value.is_meta:
                setattr(self, name, value.to(moved.device))
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the offset is to be set from the first batch of a run."""
        return self.config.calibrates

    @property
    def tracks_threshold(self) -> bool:
        """Whether the threshold follows the quantile that gives the target ratio."""
        return self.config.boundary_mode == "rule" and self.config.rule_threshold is None

    def forward(
        self, hidden_TD: Tensor, packing: Packing, sampling: BoundarySampling
    ) -> BoundaryOutput:
        """Scores each token and decides which ones are boundaries.

        Args:
            hidden_TD: encoder output.
            packing: the documents.
            sampling: names the random draws of training.

        Returns:
            Probabilities and decisions.
        """
        config = self.config
        cosine_T = self.cosine(hidden_TD)
        if config.boundary_mode == "fixed":
            mask_T = fixed_boundaries(packing.position, config.target_tokens_per_concept)
            return BoundaryOutput(mask_T.to(cosine_T.dtype), mask_T, mask_T)
        prob_T = boundary_probability(cosine_T, packing, self.offset)
        threshold_T = self._limited(threshold_boundaries(prob_T, packing, self.threshold), packing)
        mask_T = threshold_T
        if self.training and config.boundary_mode in LEARNED_MODES:
            drawn_T = sample_boundaries(prob_T, config.sharpening, sampling, packing)
            mask_T = self._limited(drawn_T, packing)
        # one flipped token would give the processes of a layer different numbers of concepts
        mask_T, threshold_T = self.seams.agree(torch.stack([mask_T, threshold_T])).unbind()
        return BoundaryOutput(prob_T, mask_T, threshold_T)

    def cosine(self, hidden_TD: Tensor) -> Tensor:
        """Cosine of each token with its predecessor, fp32 or wider (T,)."""
        if self.config.ratio_loss_detach_hidden:
            hidden_TD = hidden_TD.detach()
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
            if self.w_q is None or self.w_k is None:
                return neighbour_cosine(wide_TD, wide_TD)
            return neighbour_cosine(self.w_q(wide_TD), self.w_k(wide_TD))

    def calibrate(self, cosine: Tensor) -> None:
        """Sets the offset so that thresholding gives the target ratio on these cosines.

        How similar neighbours are in a fresh encoder depends on widths and depths, and decides
        alone whether a run starts with hardly any concept or with twice too many. The offset
        makes p >= 0.5 hold for a share 1/R of the tokens; it is not trained.

        Args:
            cosine: cosines of tokens that have a predecessor, any shape.
        """
        share = 1.0 / self.config.target_tokens_per_concept
        ordered = cosine.detach().flatten().double().sort().values
        index = min(max(int(share * ordered.numel()) - 1, 0), ordered.numel() - 1)
        self.offset.fill_(float(ordered[index]))

    def track_threshold(self, histogram: Tensor) -> None:
        """Moves the threshold of mode `rule` towards the quantile that gives the target ratio.

        Args:
            histogram: probabilities of one whole step, from `probability_histogram`.
        """
        quantile = histogram_quantile(histogram, 1.0 / self.config.target_tokens_per_concept)
        self.threshold.lerp_(quantile.to(self.threshold), 1.0 - _THRESHOLD_MOMENTUM)

    def _limited(self, mask_T: Tensor, packing: Packing) -> Tensor:
        limit = self.config.max_segment_tokens
        return limit_segments(mask_T, packing, limit) if limit else mask_T


class ConceptPool(nn.Module):
    """c_k = W_up mean of the tokens of segment k (Eq. 7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_projection = Linear(config.d_token, config.d_concept)
        # with `start_shift` the first segment of a document sees no complete concept but this one
        self.null_concept = (
            nn.Parameter(torch.zeros(config.d_concept))
            if config.segment_align == "start_shift"
            else None
        )

    def forward(self, hidden_TD: Tensor, layout: ConceptLayout) -> Tensor:
        """(T, D) to (M, C)."""
        concept_MC = self.up_projection(segment_mean(hidden_TD, layout))
        if self.null_concept is None:
            return concept_MC
        is_null_M1 = (layout.packing.position == 0).unsqueeze(1)
        return torch.where(is_null_M1, self.null_concept, concept_MC)


class ConceptReader(nn.Module):
    """Smoothing and causal cross-attention from tokens to concepts (Eq. 11-14, 16).

    Psi(H, Z) = softmax(Q K^T / sqrt(H) + mask) V W_O + H, with RMSNorm on each query and key head
    because token and concept statistics differ.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.d_token // config.token_heads
        kv_width = config.token_kv_heads * self.head_size
        self.token_norm = RMSNorm(config.d_token, config.norm_eps)
        self.concept_norm = RMSNorm(config.d_concept, config.norm_eps)
        self.wq = Linear(config.d_token, config.d_token)
        self.wk = Linear(config.d_concept, kv_width)
        self.wv = Linear(config.d_concept, kv_width)
        self.wo = Linear(config.d_token, config.d_token)
        self.query_norm = RMSNorm(self.head_size, config.norm_eps)
        self.key_norm = RMSNorm(self.head_size, config.norm_eps)
        self.seams: Seams = WHOLE

    def forward(
        self,
        hidden_TD: Tensor,
        concept_MC: Tensor,
        boundary: BoundaryOutput,
        packing: Packing,
        layout: ConceptLayout,
        backend: str,
    ) -> Tensor:
        """Adds to each token what it reads from its concepts; (T, D)."""
        smooth_MC = self.smooth(concept_MC, boundary.prob_T, layout)
        place_M = layout.packing.position
        # a token takes the place of the newest concept it sees; a key is then the same for every
        # token and replication stays exact
        query = self.query(hidden_TD, place_M.index_select(0, layout.visible_concept_T))
        key, value = self.key_value(smooth_MC, place_M)
        read_TNH = concept_attention(
            query, key, value, packing, layout, self.config.concept_weighting, backend
        )
        read_TD = self.seams.sum_from_layer(self.wo(read_TNH.flatten(1)))
        if self.config.boundary_mode == "ema_ste":
            read_TD = read_TD * _straight_through_confidence(boundary).to(read_TD.dtype)
        return hidden_TD + read_TD

    def smooth(self, concept_MC: Tensor, prob_T: Tensor, layout: ConceptLayout) -> Tensor:
        """Moving average over concepts; the probability is detached except in mode `ema_ste`."""
        if self.config.smoothing == "none" or self.config.boundary_mode == "fixed":
            return concept_MC
        weight_M = prob_T.index_select(0, layout.boundary_position_M)
        if self.config.boundary_mode != "ema_ste":
            weight_M = weight_M.detach()
        return exponential_smoothing(concept_MC, weight_M, layout.packing)

    def query(self, hidden_TD: Tensor, place_T: Tensor) -> Tensor:
        """Queries of tokens whose newest concept is the `place_T`-th of its document; (T, N, H)."""
        normed_TD = self.seams.copy_to_layer(self.token_norm(hidden_TD))
        query = self.wq(normed_TD).unflatten(-1, (-1, self.head_size))
        return self._rotate(self.query_norm(query), place_T)

    def key_value(self, smooth_MC: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the concepts at these places of their documents; (M, K, H) each."""
        normed_MC = self.seams.copy_to_layer(self.concept_norm(smooth_MC))
        key = self.wk(normed_MC).unflatten(-1, (-1, self.head_size))
        value = self.wv(normed_MC).unflatten(-1, (-1, self.head_size))
        return self._rotate(self.key_norm(key), place_M), value

    def _rotate(self, states: Tensor, place: Tensor) -> Tensor:
        if not self.config.cross_attention_rope:
            return states
        rotary = rotation(place, self.head_size, self.config.rope_theta, states.dtype)
        return rotate(states, rotary)


def _straight_through_confidence(boundary: BoundaryOutput) -> Tensor:
    """c_t = p_t or 1 - p_t by the decision, rounded up to 1 with its gradient kept; (T, 1)."""
    confidence_T = torch.where(boundary.mask_T, boundary.prob_T, 1.0 - boundary.prob_T)
    return (confidence_T + (1.0 - confidence_T).detach()).unsqueeze(1)
