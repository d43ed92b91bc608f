"""From tokens to concepts and back: concept pool and concept reader.

Letters: T tokens, M concepts, D d_token, C d_concept, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megadlcm.config import ModelConfig
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.model.seams import WHOLE, Seams
from megadlcm.model.transformer import KeyValueCache, Linear, RMSNorm
from megadlcm.ops.attention import concept_attention, concept_attention_step
from megadlcm.ops.packing import Packing
from megadlcm.ops.rotary import rotate, rotation
from megadlcm.ops.segments import ConceptLayout, segment_mean
from megadlcm.ops.smoothing import exponential_smoothing, smoothing_step


@dataclass
class PoolState:
    """The open segment of one document."""

    sum_1D: Tensor | None = None
    """Sum of its tokens' states, fp32 or wider; None while it is empty."""
    count: int = 0
    """Its tokens."""

    def add(self, hidden_1D: Tensor) -> None:
        """Takes a token into the segment."""
        # a running sum in bf16 stops growing after a few hundred tokens
        wide_1D = hidden_1D.to(torch.promote_types(hidden_1D.dtype, torch.float32))
        self.sum_1D = wide_1D if self.sum_1D is None else self.sum_1D + wide_1D
        self.count += 1


@dataclass
class ReaderState:
    """The concepts of one document, as its tokens read them."""

    concepts: KeyValueCache = field(default_factory=KeyValueCache)
    """Keys and values (M, K, H), not replicated."""
    smooth_1C: Tensor | None = None
    """Last smoothed concept, fp32 or wider; the recurrence keeps more than the model's type."""
    run_lengths: list[int] = field(default_factory=list)
    """Tokens so far that have each concept as their newest."""


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
        """Pools all segments that a boundary closes; (T, D) to (M, C)."""
        concept_MC = self.up_projection(segment_mean(hidden_TD, layout))
        if self.null_concept is None:
            return concept_MC
        is_null_M1 = (layout.packing.position == 0).unsqueeze(1)
        return torch.where(is_null_M1, self.null_concept, concept_MC)

    def step(self, hidden_1D: Tensor, is_boundary: bool, state: PoolState) -> Tensor | None:
        """Takes the next token of one document.

        Args:
            hidden_1D: encoder output of the token.
            is_boundary: the decision on it.
            state: the open segment; updated in place.

        Returns:
            The concept that the boundary makes visible, (1, C); None without a boundary.
        """
        if self.null_concept is None:  # a boundary token belongs to the segment that it closes
            state.add(hidden_1D)
        concept_1C = self._close(state) if is_boundary else None
        if self.null_concept is not None:  # a boundary token opens the next segment
            state.add(hidden_1D)
        return concept_1C

    def _close(self, state: PoolState) -> Tensor:
        # emptied first: what is added next belongs to another segment
        sum_1D, count = state.sum_1D, state.count
        state.sum_1D, state.count = None, 0
        if sum_1D is None:
            assert self.null_concept is not None, "only start_shift closes before the first token"
            return self.null_concept.unsqueeze(0)
        return self.up_projection((sum_1D / count).to(self.up_projection.weight.dtype))


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
        # from two widths into one: heads have the size of the tokens'
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
        if self.config.boundary.is_straight_through:
            read_TD = read_TD * _straight_through_confidence(boundary).to(read_TD.dtype)
        return hidden_TD + read_TD

    def step(self, hidden_1D: Tensor, state: ReaderState) -> Tensor:
        """Adds to the next token of one document what it reads from the concepts so far; (1, D)."""
        state.run_lengths[-1] += 1
        return hidden_1D + self._read_step(hidden_1D, state)

    def _read_step(self, hidden_1D: Tensor, state: ReaderState) -> Tensor:
        keys, values = state.concepts.rows
        place_1 = torch.tensor([len(state.run_lengths) - 1], device=hidden_1D.device)
        query = self.query(hidden_1D, place_1)
        weighting = self.config.concept_weighting
        read_1NH = concept_attention_step(query, keys, values, state.run_lengths, weighting)
        # no straight-through factor: it is 1 but for its gradient
        return self.wo(read_1NH.flatten(1))

    def add_concept(self, concept_1C: Tensor, prob: Tensor, state: ReaderState) -> None:
        """Smooths the next concept of one document and keeps what tokens will read of it.

        Args:
            concept_1C: output of the backbone.
            prob: boundary probability of its boundary, scalar.
            state: the concepts so far; updated in place.
        """
        place_1 = torch.tensor([len(state.run_lengths)], device=concept_1C.device)
        state.concepts.append(*self.key_value(self.smooth_step(concept_1C, prob, state), place_1))
        state.run_lengths.append(0)

    def smooth(self, concept_MC: Tensor, prob_T: Tensor, layout: ConceptLayout) -> Tensor:
        """Moving average over concepts; p has a gradient in straight-through modes only."""
        if not self.config.smooths:
            return concept_MC
        # of the boundary that completes the concept, not of the one that begins it
        weight_M = prob_T.index_select(0, layout.boundary_position_M)
        if not self.config.boundary.is_straight_through:
            weight_M = weight_M.detach()
        return exponential_smoothing(concept_MC, weight_M, layout.packing)

    def smooth_step(self, concept_1C: Tensor, prob: Tensor, state: ReaderState) -> Tensor:
        """The same for the next concept of one document; (1, C)."""
        if not self.config.smooths:
            return concept_1C
        state.smooth_1C = smoothing_step(concept_1C, prob, state.smooth_1C)
        return state.smooth_1C.to(concept_1C.dtype)

    def query(self, hidden_TD: Tensor, place_T: Tensor) -> Tensor:
        """Queries of tokens whose newest concept is the `place_T`-th of its document; (T, N, H)."""
        normed_TD = self.seams.copy_to_layer(self.token_norm(hidden_TD))
        query = self.wq(normed_TD).unflatten(-1, (-1, self.head_size))
        return self._rotate(self.query_norm(query), place_T)

    def key_value(self, smooth_MC: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the concepts at these places of their documents; (M, K, H) each."""
        normed_MC = self.seams.copy_to_layer(self.concept_norm(smooth_MC))
        key = self.wk(normed_MC).unflatten(-1, (-1, self.head_size))
        # without a norm of heads and a rotation: only scores depend on sizes and places
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
