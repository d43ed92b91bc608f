"""Bytes that a layout sends in a step, on each axis. No torch.

Letters: T tokens of a micro-batch, M its concepts, D d_token, C d_concept, t tensor parallel size,
n replicas, m micro-batches of a step, w bytes of a number. An all-reduce over t processes sends
2 (t - 1) / t of its tensor, an all-gather or a reduce-scatter of rows half of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megadlcm.config import RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.config.constants import FP32_BYTES
from megadlcm.plan.activations import element_size, rows_of, stack_widths
from megadlcm.plan.edges import Edge, edge_bytes
from megadlcm.plan.stages import Chunk, chunk_of

# all-reduces of its rows in which a block takes part, by recomputation. Both ways two; the second
# forward pass ends before its last one, which nothing needs
_ALL_REDUCES = {"none": 4.0, "selective": 5.0, "block": 5.0}
# the same with sequence parallelism: an all-reduce is an all-gather and a reduce-scatter, and both
# all-gathers come again
_ALL_REDUCES_OF_SHARDS = {"none": 4.0, "selective": 5.5, "block": 5.5}


@dataclass(frozen=True)
class Traffic:
    """Bytes that are sent in a step."""

    tensor: float
    """Inside layers, by one process of the busiest stage."""
    pipeline: float
    """Between stages, by one process of the busiest stage."""
    data: float
    """Gradients, and weights under ZeRO, by one process of the busiest stage."""
    pipeline_total: float
    """Between stages, by one process of each of them together."""
    pipeline_straight: float
    """The same with the linear placement: token states go straight from encoder to decoder."""
    pipeline_riding: float
    """The same if they rode along with the concepts from stage to stage."""
    pipeline_folded: float | None
    """The same with the folded placement; None where the model has too few units for it."""


def counts_first(config: RunConfig, micro_batches: int) -> bool:
    """Whether a step begins with a forward pass of the encoder that only counts boundaries.

    The ratio loss of each micro-batch needs the boundaries of all of them.

    Args:
        config: the run.
        micro_batches: micro-batches of one replica in a step.
    """
    # with one micro-batch the forward pass itself knows them all before its loss
    return (
        config.model.boundary.ratio_over == "step"
        and config.training.ratio_loss_weight != 0
        and config.training.ratio_statistics == "same_step"
        and micro_batches > 1
    )


def rows_of_micro_batch(config: RunConfig) -> tuple[float, float]:
    """Tokens and expected concepts of a micro-batch."""
    tokens = float(config.training.micro_batch_size * config.data.seq_len)
    if config.model.architecture == "dense":
        return tokens, 0.0
    return tokens, tokens / config.model.target_tokens_per_concept


def sent_by_stage(
    config: RunConfig,
    chunks: Sequence[Chunk],
    edges: Iterable[Edge],
    num_tokens: float,
    num_concepts: float,
    counts: bool = False,
) -> list[float]:
    """Bytes of one micro-batch that one process of each stage sends to other stages.

    Args:
        config: the run.
        chunks: the cut.
        edges: what crosses between its chunks.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M.
        counts: whether a pass up to the segmentation counts its boundaries first.
    """
    sent = [0.0] * (1 + max(chunk.stage for chunk in chunks))
    counted_until = chunk_of(chunks, UnitKind.SEGMENTATION) if counts else None
    for edge in edges:
        source, target = chunks[edge.source].stage, chunks[edge.target].stage
        if source == target:  # where the model is folded back: handed on in memory
            continue
        num_bytes = edge_bytes(config, edge, num_tokens, num_concepts)
        sent[source] += num_bytes
        if edge.has_gradient:  # as large, and sent by the other end
            sent[target] += num_bytes
        if counted_until is not None and edge.target <= counted_until:
            sent[source] += num_bytes
    return sent


def tensor_bytes(
    config: RunConfig, kind: UnitKind, num_tokens: float, num_concepts: float
) -> float:
    """Bytes that one process sends inside a unit for one micro-batch, forward and backward.

    A block has two all-reduces in each direction, after attention and after the feed-forward layer;
    with sequence parallelism each is an all-gather and a reduce-scatter, of the same volume.

    Args:
        config: the run.
        kind: what the unit does.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M.

    Returns:
        Bytes; 0 without tensor parallelism.
    """
    model, parallel, w = config.model, config.parallel, element_size(config)
    t = parallel.tensor_parallel_size
    if t == 1:
        return 0.0
    token_rows, concept_rows = num_tokens * model.d_token * w, num_concepts * model.d_concept * w
    sharded = parallel.sequence_parallel
    join = 0.5 if sharded else 0.0  # where rows become whole, or their gradients
    if kind.is_block:
        times = (_ALL_REDUCES_OF_SHARDS if sharded else _ALL_REDUCES)[parallel.recompute]
        volume = times * rows_of(kind.stream, token_rows, concept_rows)
    elif kind is UnitKind.TOKEN_EMBEDDING:
        # ids have no gradient: backward gathers at most the rows of the result
        volume = (1 + join) * token_rows
    elif kind is UnitKind.SEGMENTATION:
        volume = join * (token_rows + concept_rows) + 2 * num_tokens  # two decisions of a byte
    elif kind is UnitKind.CONCEPT_READER:
        # tokens: its result, and the gradient of its queries; concepts: that of keys and values
        volume = (2 + join) * token_rows + (1 + join) * concept_rows
    else:  # the head: also largest logit, sum and label of the cross-entropy
        volume = (1 + join) * token_rows + 3 * FP32_BYTES * num_tokens
    return 2 * (t - 1) / t * (volume + w * _summed_gains(config, kind))


def counting_tensor_bytes(config: RunConfig, kind: UnitKind, num_tokens: float) -> float:
    """The same for a forward pass that only counts boundaries, of a unit up to the segmentation."""
    t = config.parallel.tensor_parallel_size
    rows = num_tokens * config.model.d_token * element_size(config)
    join = 0.5 if config.parallel.sequence_parallel else 0.0
    # nothing goes backward, and to keep only own rows of concepts sends nothing
    volume = {
        UnitKind.TOKEN_EMBEDDING: rows,
        UnitKind.ENCODER: 2 * rows,
        UnitKind.SEGMENTATION: join * rows + 2 * num_tokens,
    }[kind]
    return 2 * (t - 1) / t * volume


def _summed_gains(config: RunConfig, kind: UnitKind) -> int:
    """Gains of which each process has a summand of the gradient: of own heads, or own rows."""
    model, sharded = config.model, config.parallel.sequence_parallel
    if kind.is_block:
        width, _, _, heads, _ = stack_widths(model, kind.stream)
        of_heads = 2 * width // heads if model.self_attention_qk_norm else 0
        return of_heads + (2 * width if sharded else 0)
    if kind is UnitKind.CONCEPT_READER:
        return 2 * model.token_head_size + (model.d_concept if sharded else 0)
    holds_norm = kind in (UnitKind.SEGMENTATION, UnitKind.LM_HEAD)
    return model.d_token if sharded and holds_norm else 0


def data_bytes(config: RunConfig, own: float, replicas: int, micro_batches: int) -> float:
    """Bytes that one process sends for gradients (fp32) and weights in a step.

    DeepSpeed has an all-reduce of whole buckets at stages 0 to 2, and at stage 2 for every
    micro-batch; at stage 3 a reduce-scatter, also for every micro-batch, and an all-gather of the
    weights for each forward and backward pass.

    Args:
        config: the run.
        own: parameters of one process.
        replicas: the data parallel size, n.
        micro_batches: micro-batches of a step, m.

    Returns:
        Bytes; 0 for one replica.
    """
    share, w = (replicas - 1) / replicas * own, element_size(config)
    stage = config.parallel.zero_stage
    # an all-reduce sends its share twice; from stage 1 on weights come back, in their own type
    if stage == 0:
        return 2 * share * FP32_BYTES
    if stage == 1:
        return share * (2 * FP32_BYTES + w)
    if stage == 2:
        return share * (2 * FP32_BYTES * micro_batches + w)
    # weights are gathered anew for every pass, for the repeated forward pass of a block as well
    passes = micro_batches * (3 if config.parallel.recompute == "block" else 2)
    passes += counts_first(config, micro_batches)  # all weights at once
    return share * (micro_batches * FP32_BYTES + passes * w)
