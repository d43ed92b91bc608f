"""Memory of one process by formula, so that a login node can see whether a layout fits. No torch.

What a unit keeps and makes is in `plan.activations`, what crosses between chunks in `plan.edges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadlcm.config import ModelConfig, RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.config.constants import BUCKET_ELEMENTS, FP32_BYTES
from megadlcm.config.training import OPTIMIZERS
from megadlcm.plan.accounting import count_parameters
from megadlcm.plan.activations import (
    element_size,
    logits_bytes,
    rotation_bytes,
    unit_activation_bytes,
    working_bytes,
)
from megadlcm.plan.edges import Edge, edge_bytes, kept_edges
from megadlcm.plan.stages import Chunk, model_units


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by use."""

    parameters: float
    """Weights in the precision of the arithmetic."""
    gradients: float
    """Sums of gradients, fp32."""
    optimizer: float
    """fp32 master weights and what the optimizer keeps of each."""
    activations: float
    """What forward keeps for backward, and what backward makes, at the target of concepts."""
    activations_worst: float
    """The same if every token were a concept."""
    buffers: float = 0.0
    """What DeepSpeed sets aside for gradients that it shares out, stages 2 and 3."""

    @property
    def total(self) -> float:
        """Bytes at the target number of concepts."""
        kept = self.parameters + self.gradients + self.optimizer
        return kept + self.buffers + self.activations

    @property
    def total_worst(self) -> float:
        """Bytes if every token were a concept."""
        return self.total - self.activations + self.activations_worst


@dataclass(frozen=True)
class HeldChunk:
    """What a process holds of one chunk."""

    chunk: Chunk
    """The chunk."""
    in_flight: int = 1
    """Micro-batches between forward and backward at the worst moment."""
    kept_edges: tuple[Edge, ...] = ()
    """What it keeps of other chunks' tensors, or for them; see `plan.edges.kept_edges`."""


def held_chunks(
    chunks: Sequence[Chunk], edges: Sequence[Edge], stage: int, in_flight: Sequence[int]
) -> list[HeldChunk]:
    """Lists what a process of a stage holds.

    Args:
        chunks: the cut.
        edges: what crosses between its chunks.
        stage: the stage.
        in_flight: micro-batches that each of its chunks holds.
    """
    own = [chunk for chunk in chunks if chunk.stage == stage]
    return [
        HeldChunk(chunk, count, kept_edges(edges, chunks, chunk.index))
        for chunk, count in zip(own, in_flight, strict=True)
    ]


def estimate_memory(
    config: RunConfig,
    data_parallel_size: int,
    chunks: Sequence[HeldChunk] | None = None,
    on_gpu: bool = True,
) -> MemoryEstimate:
    """Estimates what one process holds.

    With N own parameters of w bytes on n replicas: weights w N, gradients 4 N, master weights 4 N
    (none at stage 0, which trains the weights themselves) and moments 8 N. ZeRO divides optimizer
    (stage 1), gradients (2) and weights (3) by n. Not counted: fragmentation, the CUDA context,
    one layer's gathered weights under stage 3, gradients between a layer's backward pass and the
    sum that they are added to.

    Args:
        config: the run.
        data_parallel_size: replicas.
        chunks: what the process holds of the model; None means all of it and one micro-batch.
        on_gpu: whether the run is on a GPU.

    Returns:
        Bytes by use.
    """
    chunks = chunks or _whole_model(config)
    stage = config.parallel.zero_stage
    # sharded by tensor parallelism first; ZeRO then shares what is left over the replicas
    num_parameters = sum(own_parameters(config, held.chunk) for held in chunks)

    def held(num_bytes: float, shared_from: int) -> float:
        return num_parameters * num_bytes / (data_parallel_size if stage >= shared_from else 1)

    # at stage 0 the weights are trained themselves, which is why bf16 needs stage 1
    master = FP32_BYTES if stage >= 1 else 0
    moments = OPTIMIZERS[config.optimizer.name].num_moments * FP32_BYTES
    tokens = config.training.micro_batch_size * config.data.seq_len
    ratio = config.model.target_tokens_per_concept
    return MemoryEstimate(
        parameters=held(element_size(config), 3),
        gradients=held(FP32_BYTES, 2),
        optimizer=held(master + moments, 1),
        activations=activation_bytes(config, tokens, tokens / ratio, chunks, on_gpu),
        activations_worst=activation_bytes(config, tokens, tokens, chunks, on_gpu),
        # DeepSpeed allocates it whole, however small the model is
        buffers=BUCKET_ELEMENTS * FP32_BYTES if stage >= 2 else 0.0,
    )


def own_parameters(config: RunConfig, chunk: Chunk) -> float:
    """Parameters of a chunk that one process of a tensor parallel group holds."""
    kinds = chunk.kinds.items()
    whole = sum(count * whole_parameters(config.model, kind) for kind, count in kinds)
    return whole + (chunk.parameters - whole) / config.parallel.tensor_parallel_size


def whole_parameters(model: ModelConfig, kind: UnitKind) -> int:
    """Counts the parameters of a unit that tensor parallelism does not shard.

    Gains, boundary detector and concept pool are whole on every process of a group.

    Args:
        model: shape of the model.
        kind: what the unit does.

    Returns:
        Their number.
    """
    d, c = model.d_token, model.d_concept
    if kind is UnitKind.TOKEN_EMBEDDING:
        return 0
    if kind is UnitKind.LM_HEAD:
        return d
    if kind is UnitKind.CONCEPT_READER:
        # last norm of the backbone; norms of tokens, concepts, query heads and key heads
        return c + d + c + 2 * model.token_head_size
    if kind is UnitKind.SEGMENTATION:
        counts = count_parameters(model)
        # every process takes every decision and pools every concept
        return d + counts["boundary_detector"] + counts["concept_pool"]
    on_concepts = kind is UnitKind.BACKBONE
    width, head = (c, model.concept_head_size) if on_concepts else (d, model.token_head_size)
    return 2 * width + (2 * head if model.self_attention_qk_norm else 0)


def activation_bytes(
    config: RunConfig,
    num_tokens: float,
    num_concepts: float,
    chunks: Sequence[HeldChunk] | None = None,
    on_gpu: bool = True,
) -> float:
    """Estimates the most that activations take on one process during a step.

    What forward passes keep, and what the backward pass of one unit makes on top of it: recomputed
    activations and gradients. By then the units after it in the same micro-batch are free again.

    Args:
        config: the run.
        num_tokens: tokens of a micro-batch, T.
        num_concepts: its concepts, M; not read for the dense model.
        chunks: what the process holds; None means the whole model and one micro-batch.
        on_gpu: whether the run is on a GPU.

    Returns:
        Bytes.
    """
    rows = (num_tokens, num_concepts)
    total, working = 0.0, 0.0
    for held in chunks or _whole_model(config):
        of_micro_batch = sum(edge_bytes(config, edge, *rows) for edge in held.kept_edges)
        free = 0.0
        for kind, count in reversed(held.chunk.kinds.items()):
            # the last unit of a kind has the least free memory, so it decides for all of them
            working = max(working, working_bytes(config, kind, *rows, on_gpu) - free)
            kept = count * unit_activation_bytes(config, kind, *rows, on_gpu)
            kept += rotation_bytes(config, kind, *rows)  # one for all neighbouring blocks
            of_micro_batch += kept
            free += kept
            if kind is UnitKind.LM_HEAD:  # logits stay until the chunk's backward pass is over
                free -= logits_bytes(config, num_tokens)
        # the peak of working memory is counted once: one backward pass runs at a time
        total += held.in_flight * of_micro_batch
    return total + working


def _whole_model(config: RunConfig) -> list[HeldChunk]:
    """What the only process of a run holds, with one micro-batch."""
    return [HeldChunk(Chunk(0, 0, tuple(model_units(config.model, config.data.seq_len))))]
