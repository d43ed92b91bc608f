"""What forward keeps for backward, by formula, for each unit of the model. No torch.

Bytes, for T tokens of a micro-batch and M concepts, with these letters: D d_token, C d_concept,
K width of the keys, F inner width of a feed-forward layer, N heads, H head size, S width of the
detector, V vocabulary, w bytes of a number of the arithmetic, t tensor parallel size, r = 1/t with
sequence parallelism and else 1.

A row of a norm keeps w D + 4 where one kernel does it all (a GPU): its input, and a scale in fp32.
Elsewhere it keeps 8 D + 4: its input and the scaled input in fp32. Its output counts where it is
used. A block keeps, of each row, with P for what a norm keeps:

| recompute   | bytes of a row                                                    |
|-------------|-------------------------------------------------------------------|
| `none`      | 2 r P + 2 w D + (w (2 D + 2 K + 4 F) + 4 N) / t                   |
| `selective` | w D (r + 2) + (w (2 D + 2 K + 2 F) + 4 N) / t                     |
| `block`     | r w D                                                             |

`none`: two norms and their outputs, queries, keys, values, what attention made and the logarithms
of its sums, gate, silu(gate), up and their product. `selective`: the input, and what matrix
products and attention made. Attention maps are not counted: the kernels keep none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megadlcm.config import ModelConfig, RunConfig
from megadlcm.config.anatomy import Stream, UnitKind
from megadlcm.config.constants import (
    BF16_BYTES,
    FP32_BYTES,
    FP64_BYTES,
    INT64_BYTES,
    SMOOTHING_CHUNK,
)
from megadlcm.config.kernels import backend_candidates


@dataclass(frozen=True)
class Arithmetic:
    """How a run computes; decides what its kernels keep."""

    element: int
    """Bytes of a number, w."""
    fused: bool
    """Whether a norm is one kernel: on a GPU."""
    kernels: bool
    """Whether attention runs over all packed documents at once: on a GPU, in half precision."""
    split: int
    """Tensor parallel size, t."""
    rows: float
    """Share of the rows that a process keeps between layers, r."""

    def norm(self, width: float, groups: float = 1.0) -> float:
        """Bytes that a norm keeps of a row, without its output, in `groups` of `width` in all."""
        kept = self.element if self.fused else 2 * FP32_BYTES
        # a scale in fp32 for each group
        return kept * width + FP32_BYTES * groups


def arithmetic_of(config: RunConfig, on_gpu: bool = True) -> Arithmetic:
    """Finds how a run computes.

    Args:
        config: the run.
        on_gpu: whether it runs on a GPU.

    Returns:
        Its arithmetic.
    """
    parallel, half = config.parallel, config.training.precision == "bf16"
    size = parallel.tensor_parallel_size
    backends = backend_candidates(config.model.attention_backend).values()
    return Arithmetic(
        element=element_size(config),
        fused=on_gpu,
        # the kernels take half precision only; in fp32 `auto` falls back to the reference
        kernels=on_gpu and half and any(backend.attends_packed for backend in backends),
        split=size,
        rows=1.0 / size if parallel.sequence_parallel else 1.0,
    )


def element_size(config: RunConfig) -> int:
    """Bytes of one number of the arithmetic."""
    return BF16_BYTES if config.training.precision == "bf16" else FP32_BYTES


def unit_activation_bytes(
    config: RunConfig, kind: UnitKind, num_tokens: float, num_concepts: float, on_gpu: bool = True
) -> float:
    """Estimates what the forward pass of one unit keeps for its backward pass.

    Counted with its input, which the unit before it made, and without its output. Without a kernel
    attention from tokens to concepts keeps a mask, which is counted for documents as long as
    data.seq_len.

    Args:
        config: the run.
        kind: what the unit does.
        num_tokens: tokens of a micro-batch, T.
        num_concepts: its concepts, M.
        on_gpu: whether the run is on a GPU.

    Returns:
        Bytes on one process.
    """
    how = arithmetic_of(config, on_gpu)
    if kind is UnitKind.TOKEN_EMBEDDING:
        # positions; also which tokens belong to this part of the vocabulary, and their places in it
        return num_tokens * (INT64_BYTES if how.split == 1 else 2 * INT64_BYTES + 1)
    if kind is UnitKind.SEGMENTATION:
        return _segmentation(config.model, how, num_tokens, num_concepts)
    if kind is UnitKind.CONCEPT_READER:
        mask = num_concepts * min(config.data.seq_len, num_tokens)
        return _reader(config.model, how, num_tokens, num_concepts, mask)
    if kind is UnitKind.LM_HEAD:
        d, w = config.model.d_token, how.element
        # in fp32 the logarithms of the probabilities, or for parts of the vocabulary distances from
        # the largest logit and their exponentials
        loss = FP32_BYTES * min(how.split, 2) * config.model.vocab_size / how.split
        indices = INT64_BYTES if how.split == 1 else INT64_BYTES + 2 * FP32_BYTES + 1
        logits = logits_bytes(config, num_tokens)
        return logits + num_tokens * (how.rows * how.norm(d) + w * d + loss + indices)
    return rows_of(kind.stream, num_tokens, num_concepts) * block_bytes(
        config.model, how, kind, config.parallel.recompute
    )


def rows_of(stream: Stream, num_tokens: float, num_concepts: float) -> float:
    """Rows of the states of a micro-batch."""
    return num_concepts if stream is Stream.CONCEPTS else num_tokens


def logits_bytes(config: RunConfig, num_tokens: float) -> float:
    """Logits, which a chunk keeps until its backward pass is over; counted with `lm_head`."""
    split = config.parallel.tensor_parallel_size
    return element_size(config) * num_tokens * config.model.vocab_size / split


def working_bytes(
    config: RunConfig, kind: UnitKind, num_tokens: float, num_concepts: float, on_gpu: bool = True
) -> float:
    """Estimates what the backward pass of one unit has at once, more than forward kept.

    The head: two gradients of the size of the logits, in fp32. A block: gradients of two inner
    widths and of the residuals, after it made again what it did not keep; with `selective` the
    kept output of its last product stays, which nothing needs.

    Args:
        config: the run.
        kind: what the unit does.
        num_tokens: tokens of a micro-batch, T.
        num_concepts: its concepts, M.
        on_gpu: whether the run is on a GPU.

    Returns:
        Bytes on one process.
    """
    model, how = config.model, arithmetic_of(config, on_gpu)
    d, w, t = model.d_token, how.element, how.split
    norm = (w if how.fused else 2 * FP32_BYTES) * 2  # gradients of a norm for each number
    if kind is UnitKind.TOKEN_EMBEDDING:
        return num_tokens * w * d
    if kind is UnitKind.LM_HEAD:
        return num_tokens * max(2 * FP32_BYTES * model.vocab_size / t, norm * d)
    if kind is UnitKind.SEGMENTATION:
        return num_tokens * FP32_BYTES * 5 * (model.boundary_size or d)
    if kind is UnitKind.CONCEPT_READER:
        return num_tokens * norm * d + num_concepts * norm * model.d_concept
    recompute = config.parallel.recompute
    width, _, f, _, _ = stack_widths(model, kind.stream)
    of_row = w * (2 * f / t + 2 * width)
    of_row += block_bytes(model, how, kind, "none") - block_bytes(model, how, kind, recompute)
    if recompute == "selective":
        of_row += w * width
    return of_row * rows_of(kind.stream, num_tokens, num_concepts)


def rotation_bytes(
    config: RunConfig, kind: UnitKind, num_tokens: float, num_concepts: float
) -> float:
    """Cosines and sines that the neighbouring blocks of a stack keep together.

    Args:
        config: the run.
        kind: of the units; only blocks rotate.
        num_tokens: tokens of a micro-batch, T.
        num_concepts: its concepts, M.

    Returns:
        Bytes; 0 for a unit that is not of a stack.
    """
    if not kind.is_block:
        return 0.0
    rows, model = rows_of(kind.stream, num_tokens, num_concepts), config.model
    head = model.concept_head_size if kind.stream is Stream.CONCEPTS else model.token_head_size
    return element_size(config) * rows * head


def block_bytes(model: ModelConfig, how: Arithmetic, kind: UnitKind, recompute: str) -> float:
    """Bytes that a block keeps of a row; see the table above.

    Args:
        model: shape of the model.
        how: its arithmetic.
        kind: of the block.
        recompute: `none`, `selective` or `block`.

    Returns:
        Bytes on one process.
    """
    d, kv, f, heads, kv_heads = stack_widths(model, kind.stream)
    w, t, r = how.element, how.split, how.rows
    if recompute == "block":  # its input, in shards with sequence parallelism
        return r * w * d
    inner = (w * (2 * d + 2 * kv + 2 * f) + FP32_BYTES * heads) / t
    if recompute == "selective":
        return w * d * (r + 2) + inner
    # silu(gate) and the product, which `selective` makes again
    inner += w * 2 * f / t
    if model.self_attention_qk_norm:
        inner += how.norm(d + kv, heads + kv_heads) / t
    if not how.kernels:  # documents one after the other, put together
        inner += w * d / t
    return 2 * r * how.norm(d) + 2 * w * d + inner


def stack_widths(model: ModelConfig, stream: Stream) -> tuple[int, int, int, int, int]:
    """D, K, F, heads and key-value heads of the blocks that run on these rows."""
    if stream is Stream.CONCEPTS:
        heads, kv_heads = model.concept_heads, model.concept_kv_heads
        kv = kv_heads * model.concept_head_size
        return model.d_concept, kv, model.concept_ffn_size, heads, kv_heads
    heads, kv_heads = model.token_heads, model.token_kv_heads
    return model.d_token, kv_heads * model.token_head_size, model.token_ffn_size, heads, kv_heads


def _segmentation(
    model: ModelConfig, how: Arithmetic, num_tokens: float, num_concepts: float
) -> float:
    """Norm and its output, detector in fp32, means of the segments, indices."""
    d, w = model.d_token, how.element
    is_learned = model.boundary.is_learned
    size = (model.boundary_size or d) if is_learned else d
    # lengths of both vectors, raw and clamped, cosine, probability and decisions
    scored = model.boundary.decides_by == "score"
    trains = scored and (is_learned or not model.ratio_loss_detach_hidden)
    detector = 7.0 * FP32_BYTES + 4 if trains else 0.0
    if not scored:  # decisions, also as numbers
        detector = FP32_BYTES + 2
    if trains:
        detector += FP32_BYTES * 2 * size  # unit vectors
        if is_learned:
            detector += FP32_BYTES * 2 * size  # vectors
        if w != FP32_BYTES:
            detector += FP32_BYTES * d  # the states in fp32
    weights = 0.0
    if is_learned and w != FP32_BYTES and not model.ratio_loss_detach_hidden:
        weights = FP32_BYTES * 2 * size * d  # in fp32, for the gradient of the states
    indices = 3 * INT64_BYTES * num_tokens + 7 * INT64_BYTES * num_concepts
    return (
        num_tokens * (how.rows * how.norm(d) + w * d + detector)
        + num_concepts * w * d
        + weights
        + indices
    )


def _reader(
    model: ModelConfig, how: Arithmetic, num_tokens: float, num_concepts: float, mask: float
) -> float:
    """Norm of the backbone, smoothing, two norms, queries, keys, values, attention.

    The token states are the segmentation's and not counted again.
    """
    d, c, w, t = model.d_token, model.d_concept, how.element, how.split
    _, kv, _, heads, kv_heads = stack_widths(model, Stream.TOKENS)
    rotation = w * model.token_head_size if model.cross_attention_rope else 0
    of_token = how.norm(d) + rotation  # its output, less its input, which is counted already
    of_token += (how.norm(d, heads) + FP32_BYTES * heads) / t
    of_concept = (
        how.rows * how.norm(c) + how.norm(c) + w * c + rotation + how.norm(kv, kv_heads) / t
    )
    if model.boundary.is_straight_through:  # what the confidence multiplies, and the confidence
        of_token += w * d + FP32_BYTES
    smoothing = _smoothing(model, how, num_concepts)  # in fp32, whatever the precision
    if how.kernels and model.concept_weighting == "count":
        # queries, what attention made, keys and values of each token's concept
        of_token += 2 * w * (d + kv) / t
        return num_tokens * of_token + num_concepts * of_concept + smoothing
    # the reference adds the logarithm of the count to the scores, so it attends in fp32
    wide = FP32_BYTES if model.concept_weighting == "count" else w
    of_token += (2 * wide * d + w * d) / t
    of_concept += 2 * wide * kv / t
    return num_tokens * of_token + num_concepts * of_concept + smoothing + wide * mask


def _smoothing(model: ModelConfig, how: Arithmetic, num_concepts: float) -> float:
    """The small matrices that smooth a chunk of concepts, and the chunks of chunks."""
    if not model.smooths:
        return 0.0
    rows, c, trains_weights = num_concepts, model.d_concept, model.boundary.is_straight_through
    kept = num_concepts * (FP32_BYTES + (FP32_BYTES * (c + 1) + 1 if trains_weights else 0))
    while True:  # chunks of concepts, then chunks of what enters those, ...
        num_chunks = math.ceil(rows / SMOOTHING_CHUNK)
        filled = num_chunks * SMOOTHING_CHUNK
        kept += FP32_BYTES * SMOOTHING_CHUNK * filled
        if trains_weights:  # also what they are multiplied with, and their products in fp64
            kept += filled * (FP32_BYTES * c + (FP64_BYTES + 1) * (SMOOTHING_CHUNK + 1))
            kept += num_chunks * (FP32_BYTES * c + FP64_BYTES) if num_chunks > 1 else 0
        if (
            how.element == FP32_BYTES and rows == num_concepts
        ):  # the result is kept with its filling
            kept += FP32_BYTES * c * (filled - num_concepts)
        if num_chunks == 1:
            return kept
        kept += FP32_BYTES * filled
        rows = num_chunks
