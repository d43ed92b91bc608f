"""Bytes that a layout sends in a step, on each axis. No torch.

Letters: T tokens of a micro-batch, M its concepts, D d_token, C d_concept, t tensor parallel size,
n replicas, m micro-batches of a step, w bytes of a number. A sum over t processes sends
2 (t - 1) / t of its tensor, a gather of rows or a sum of rows half of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megadlcm.config import RunConfig
from megadlcm.plan.activations import STACKS, element_size, stack_widths
from megadlcm.plan.memory import whole_parameters
from megadlcm.plan.stages import READER, SEGMENTATION, Chunk, Unit

_FP32 = 4
_DECISION_BYTES = 1
# sums of its rows in which a block takes part, by recomputation. Both ways two; the second forward
# pass ends before its last sum, which nothing needs
_SUMS = {"none": 4.0, "selective": 5.0, "block": 5.0}
# the same where rows are cut: a sum is a gather and a sum of rows, and both gathers come again
_SUMS_OF_CUT_ROWS = {"none": 4.0, "selective": 5.5, "block": 5.5}


class Edge(NamedTuple):
    """What one micro-batch sends from stage to stage, forward or backward."""

    source: int
    """Stage that sends."""
    target: int
    """Stage that receives."""
    forward: float
    """Bytes of states, decisions and scores."""
    backward: float
    """Bytes of gradients, which go the other way."""


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
    return (
        config.model.boundary.ratio_over == "step"
        and config.training.ratio_loss_weight != 0
        and config.training.ratio_statistics == "same_step"
        and micro_batches > 1
    )


def own_parameters(config: RunConfig, units: Sequence[Unit]) -> float:
    """Parameters of some units that one process of a tensor parallel group holds.

    Args:
        config: the run.
        units: the units.

    Returns:
        Whole ones, and its share of the others.
    """
    size, own = config.parallel.tensor_parallel_size, 0.0
    for unit in units:
        whole = whole_parameters(config.model, unit.name)
        own += whole + (unit.parameters - whole) / size
    return own


def rows_of_micro_batch(config: RunConfig) -> tuple[float, float]:
    """Tokens and expected concepts of a micro-batch."""
    tokens = float(config.training.micro_batch_size * config.data.seq_len)
    if config.model.architecture == "dense":
        return tokens, 0.0
    return tokens, tokens / config.model.target_tokens_per_concept


def pipeline_edges(
    config: RunConfig,
    chunks: Sequence[Chunk],
    num_tokens: float,
    num_concepts: float,
    rides: bool = False,
) -> list[Edge]:
    """Lists what crosses between stages for one micro-batch, sent by one process of each stage.

    Args:
        config: the run.
        chunks: the cut.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M.
        rides: whether token states would go to the decoder from stage to stage, which the pipeline
            does not do; for comparison.

    Returns:
        One edge from chunk to chunk, and one for token states from encoder to decoder, where these
        are on different stages.
    """
    model, parallel, w = config.model, config.parallel, element_size(config)
    cut = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
    skip = num_tokens * model.d_token * w
    if model.boundary.is_straight_through:
        skip += num_tokens * _FP32  # scores that have a gradient
    where = {unit.name: chunk for chunk in chunks for unit in chunk.units}
    ends = (where[SEGMENTATION], where[READER]) if SEGMENTATION in where else None
    edges = []
    for chunk, following in itertools.pairwise(chunks):
        concepts = chunk.units[-1].stream == "concepts"
        rows = num_concepts * model.d_concept if concepts else num_tokens * model.d_token
        forward = backward = rows * w / cut
        if ends is not None and chunk.index >= ends[0].index:
            forward += num_tokens * (_DECISION_BYTES + _FP32)
            if rides and chunk.index < ends[1].index:
                forward, backward = forward + skip, backward + skip
        if chunk.stage != following.stage:
            edges.append(Edge(chunk.stage, following.stage, forward, backward))
    if ends is not None and ends[0].stage != ends[1].stage and not rides:
        edges.append(Edge(ends[0].stage, ends[1].stage, skip, skip))
    return edges


def sent_by_stage(edges: Sequence[Edge], num_stages: int) -> list[float]:
    """Bytes of one micro-batch that one process of each stage sends to other stages."""
    sent = [0.0] * num_stages
    for edge in edges:
        sent[edge.source] += edge.forward
        sent[edge.target] += edge.backward
    return sent


def tensor_bytes(config: RunConfig, unit: str, num_tokens: float, num_concepts: float) -> float:
    """Bytes that one process sends inside a unit for one micro-batch, forward and backward.

    A block sums its rows twice in each direction, after attention and after the feed-forward layer;
    with cut rows each sum is a gather and a sum of rows, of the same volume.

    Args:
        config: the run.
        unit: name of the unit.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M.

    Returns:
        Bytes; 0 without tensor parallelism.
    """
    model, parallel, w = config.model, config.parallel, element_size(config)
    t, kind = parallel.tensor_parallel_size, unit.partition(".")[0]
    if t == 1:
        return 0.0
    token_rows, concept_rows = num_tokens * model.d_token * w, num_concepts * model.d_concept * w
    cut = parallel.sequence_parallel
    join = 0.5 if cut else 0.0  # where rows become whole, or their gradients
    if kind in STACKS:
        sums = (_SUMS_OF_CUT_ROWS if cut else _SUMS)[parallel.recompute]
        volume = sums * (concept_rows if kind == "backbone" else token_rows)
    elif kind == "token_embedding":
        volume = (1 + join) * token_rows
    elif kind == SEGMENTATION:
        volume = join * (token_rows + concept_rows) + 2 * num_tokens  # two decisions of a byte
    elif kind == READER:
        volume = (2 + join) * token_rows + (1 + join) * concept_rows
    else:  # the head: also largest logit, sum and label of the cross-entropy
        volume = (1 + join) * token_rows + 3 * _FP32 * num_tokens
    return 2 * (t - 1) / t * (volume + w * _summed_gains(config, kind))


def counting_tensor_bytes(config: RunConfig, unit: str, num_tokens: float) -> float:
    """The same for a forward pass that only counts boundaries, of a unit up to the segmentation."""
    parallel, kind = config.parallel, unit.partition(".")[0]
    t, rows = (
        parallel.tensor_parallel_size,
        num_tokens * config.model.d_token * element_size(config),
    )
    join = 0.5 if parallel.sequence_parallel else 0.0
    volume = {"token_embedding": rows, "encoder": 2 * rows, SEGMENTATION: join * rows}[kind]
    if kind == SEGMENTATION:
        volume += 2 * num_tokens
    return 2 * (t - 1) / t * volume


def _summed_gains(config: RunConfig, kind: str) -> int:
    """Gains of which each process has a summand of the gradient: of own heads, or own rows."""
    model, cut = config.model, config.parallel.sequence_parallel
    if kind in STACKS:
        width, _, _, heads, _ = stack_widths(model, kind)
        of_heads = 2 * width // heads if model.self_attention_qk_norm else 0
        return of_heads + (2 * width if cut else 0)
    if kind == READER:
        return 2 * model.token_head_size + (model.d_concept if cut else 0)
    return model.d_token if cut and kind in (SEGMENTATION, "lm_head") else 0


def data_bytes(config: RunConfig, own: float, replicas: int, micro_batches: int) -> float:
    """Bytes that one process sends for gradients (fp32) and weights in a step.

    DeepSpeed sums whole buckets over all replicas at stages 0 to 2, and at stage 2 does so for
    every micro-batch; at stage 3 it sums each share to its owner, also for every micro-batch, and
    gathers weights for each forward and backward pass.

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
    if stage == 0:
        return 2 * share * _FP32
    if stage == 1:
        return share * (2 * _FP32 + w)
    if stage == 2:
        return share * (2 * _FP32 * micro_batches + w)
    passes = micro_batches * (3 if config.parallel.recompute == "block" else 2)
    passes += counts_first(config, micro_batches)  # all weights at once
    return share * (micro_batches * _FP32 + passes * w)
