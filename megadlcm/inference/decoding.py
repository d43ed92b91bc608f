"""Token-by-token decoding with caches: the same function as the parallel forward.

The backbone runs only when a boundary closes a segment, so most steps cost the token stacks
alone. One state belongs to one document.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megadlcm.model.dlcm import DLCM
from megadlcm.model.transformer import Stack
from megadlcm.ops.attention import biased_attention
from megadlcm.ops.boundary import fixed_boundaries
from megadlcm.ops.rotary import rotation
from megadlcm.ops.smoothing import MIN_WEIGHT


@dataclass
class StackCache:
    """Keys and values of every block of a stack, (rows so far, K, H) each."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    length: int = 0

    def extend(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one row to a block's cache and returns all its rows."""
        if block == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[block] = torch.cat((self.keys[block], key))
            self.values[block] = torch.cat((self.values[block], value))
        return self.keys[block], self.values[block]


@dataclass
class DecodeState:
    """Everything that decoding one document carries from token to token."""

    encoder: StackCache = field(default_factory=StackCache)
    backbone: StackCache = field(default_factory=StackCache)
    decoder: StackCache = field(default_factory=StackCache)
    previous_D: Tensor | None = None
    """Encoder output of the token before; the boundary compares with it."""
    open_sum_D: Tensor | None = None
    """Sum of the encoder outputs of the open segment, fp32 or wider; None while it is empty."""
    open_count: int = 0
    """Tokens in the open segment."""
    since_boundary: int = 0
    """Tokens since the last boundary, it included."""
    smooth_1C: Tensor | None = None
    """Last smoothed concept, fp32 or wider; the recurrence keeps more than the model's type."""
    concept_key: Tensor | None = None
    """Keys of the concepts for cross-attention (M, K, H), not replicated."""
    concept_value: Tensor | None = None
    """Values of the concepts (M, K, H)."""
    run_lengths: list[int] = field(default_factory=list)
    """Tokens so far that have each concept as their newest."""

    @property
    def num_concepts(self) -> int:
        """Concepts so far; the backbone ran once for each."""
        return len(self.run_lengths)


@torch.no_grad()
def decode_step(model: DLCM, state: DecodeState, token: int) -> Tensor:
    """Reads one token and returns the logits of the next one; boundaries are thresholded.

    Args:
        model: the model, in evaluation mode.
        state: the document so far; updated in place.
        token: id of the token that is read.

    Returns:
        Logits (V,).
    """
    device = model.token_embedding.weight.device
    embedded_1D = model.token_embedding(torch.tensor([token], device=device))
    hidden_1D = _stack_step(model.encoder, state.encoder, embedded_1D)
    probability = _boundary_step(model, state, hidden_1D)
    # with `start_shift` a boundary token opens the next segment, so the old one closes without it
    closes_first = model.config.segment_align == "start_shift"
    if probability is not None and closes_first:
        _close_segment(model, state, probability)
    _extend_segment(state, hidden_1D)
    if probability is not None and not closes_first:
        _close_segment(model, state, probability)
    state.since_boundary = 1 if probability is not None else state.since_boundary + 1
    state.run_lengths[-1] += 1
    state.previous_D = hidden_1D[0]
    fused_1D = hidden_1D + _read_concepts(model, state, hidden_1D)
    return model.logits(_stack_step(model.decoder, state.decoder, fused_1D))[0]


def _boundary_step(model: DLCM, state: DecodeState, hidden_1D: Tensor) -> Tensor | None:
    """Returns the probability of the boundary at this token, or None where there is none."""
    detector, config = model.boundary_detector, model.config
    wide = torch.promote_types(hidden_1D.dtype, torch.float32)
    one = torch.ones((), dtype=wide, device=hidden_1D.device)
    if state.previous_D is None:
        return one
    if config.boundary_mode == "fixed":
        position = torch.tensor(state.decoder.length)
        return one if fixed_boundaries(position, config.target_tokens_per_concept) else None
    cosine = detector.cosine(torch.stack((state.previous_D, hidden_1D[0])))[1]
    probability = ((1.0 - cosine + detector.offset) / 2).clamp(0.0, 1.0)
    limit = config.max_segment_tokens
    forced = bool(limit) and state.since_boundary % limit == 0
    return probability if forced or bool(probability >= detector.threshold) else None


def _extend_segment(state: DecodeState, hidden_1D: Tensor) -> None:
    hidden_D = hidden_1D[0].to(torch.promote_types(hidden_1D.dtype, torch.float32))
    state.open_sum_D = hidden_D if state.open_sum_D is None else state.open_sum_D + hidden_D
    state.open_count += 1


def _close_segment(model: DLCM, state: DecodeState, probability: Tensor) -> None:
    """Pools the open segment, runs the backbone on it and caches what tokens will read."""
    pool, reader = model.concept_pool, model.concept_reader
    if state.open_sum_D is None:
        assert pool.null_concept is not None, "only start_shift closes before the first token"
        concept_1C = pool.null_concept.unsqueeze(0)
    else:
        mean_D = (state.open_sum_D / state.open_count).to(pool.up_projection.weight.dtype)
        concept_1C = pool.up_projection(mean_D.unsqueeze(0))
    state.open_sum_D, state.open_count = None, 0
    concept_1C = _stack_step(model.backbone, state.backbone, concept_1C)
    concept_1C = _smooth_step(model, state, concept_1C, probability)
    place_1 = torch.tensor([state.num_concepts], device=concept_1C.device)
    key, value = reader.key_value(concept_1C, place_1)
    state.concept_key = _append(state.concept_key, key)
    state.concept_value = _append(state.concept_value, value)
    state.run_lengths.append(0)


def _smooth_step(
    model: DLCM, state: DecodeState, concept_1C: Tensor, probability: Tensor
) -> Tensor:
    config = model.config
    if config.smoothing == "none" or config.boundary_mode == "fixed":
        return concept_1C
    smooth_1C = concept_1C.to(torch.promote_types(concept_1C.dtype, torch.float32))
    if state.smooth_1C is not None:
        weight = probability.to(smooth_1C.dtype).clamp(MIN_WEIGHT, 1.0 - MIN_WEIGHT)
        smooth_1C = weight * smooth_1C + (1.0 - weight) * state.smooth_1C
    state.smooth_1C = smooth_1C
    return smooth_1C.to(concept_1C.dtype)


def _read_concepts(model: DLCM, state: DecodeState, hidden_1D: Tensor) -> Tensor:
    """Cross-attention of the newest token to every concept so far; (1, D)."""
    reader = model.concept_reader
    place_1 = torch.tensor([state.num_concepts - 1], device=hidden_1D.device)
    query = reader.query(hidden_1D, place_1)
    assert state.concept_key is not None and state.concept_value is not None
    concepts = state.concept_key, state.concept_value
    if model.config.concept_weighting == "uniform":
        return reader.wo(_attend(query, *concepts))
    counts = torch.tensor(state.run_lengths, dtype=torch.float64, device=hidden_1D.device)
    return reader.wo(biased_attention(query, *concepts, counts.log().unsqueeze(0)).flatten(1))


def _stack_step(stack: Stack, cache: StackCache, states_1D: Tensor) -> Tensor:
    position = torch.tensor([cache.length], device=states_1D.device)
    shape = stack.shape
    rotary = rotation(position, shape.head_size, shape.rope_theta, states_1D.dtype)
    for index, block in enumerate(stack.layers):
        query, key, value = block.attention.project(block.attention_norm(states_1D), rotary)
        keys, values = cache.extend(index, key, value)
        states_1D = states_1D + block.attention.wo(_attend(query, keys, values))
        states_1D = states_1D + block.feed_forward(block.feed_forward_norm(states_1D))
    cache.length += 1
    assert stack.norm is not None
    normed_1D: Tensor = stack.norm(states_1D)
    return normed_1D


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query row against all cached rows; (1, N * H)."""
    grouped = query.shape[1] != keys.shape[1]
    batched = [part.transpose(0, 1).unsqueeze(0) for part in (query, keys, values)]
    output = F.scaled_dot_product_attention(batched[0], batched[1], batched[2], enable_gqa=grouped)
    return output.transpose(1, 2).reshape(1, -1)


def _append(cached: Tensor | None, row: Tensor) -> Tensor:
    return row if cached is None else torch.cat((cached, row))
