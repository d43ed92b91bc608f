"""Memory of one process by formula, so that a login node can see whether a layout fits. No torch.

What a unit keeps and makes is in `parallel.activations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadlcm.config import ModelConfig, RunConfig
from megadlcm.config.training import OPTIMIZERS
from megadlcm.plan.activations import (
    arithmetic_of,
    element_size,
    logits_bytes,
    rotation_bytes,
    unit_activation_bytes,
    working_bytes,
)
from megadlcm.plan.stages import READER, SEGMENTATION, Unit, model_units

_FP32 = 4
_BUCKET_BYTES = 50_000_000 * _FP32
"""Elements of DeepSpeed's bucket, see `training.engine`, in fp32."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by use."""

    parameters: float
    """Weights in the precision of the arithmetic."""
    gradients: float
    """Sums of gradients, fp32."""
    optimizer: float
    """fp32 master weights and the moments of AdamW."""
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

    units: tuple[Unit, ...]
    """Its units."""
    in_flight: int = 1
    """Micro-batches between forward and backward at the worst moment."""


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
    if chunks is None:
        chunks = [HeldChunk(tuple(model_units(config.model, config.data.seq_len)))]
    stage, size = config.parallel.zero_stage, config.parallel.tensor_parallel_size
    num_parameters = 0.0
    for chunk in chunks:
        for unit in chunk.units:
            whole = whole_parameters(config.model, unit.name)
            num_parameters += whole + (unit.parameters - whole) / size

    def held(num_bytes: float, shared_from: int) -> float:
        return num_parameters * num_bytes / (data_parallel_size if stage >= shared_from else 1)

    master = _FP32 if stage >= 1 else 0
    moments = OPTIMIZERS[config.optimizer.name].num_moments * _FP32
    tokens = config.training.micro_batch_size * config.data.seq_len
    ratio = config.model.target_tokens_per_concept
    return MemoryEstimate(
        parameters=held(element_size(config), 3),
        gradients=held(_FP32, 2),
        optimizer=held(master + moments, 1),
        activations=activation_bytes(config, tokens, tokens / ratio, chunks, on_gpu),
        activations_worst=activation_bytes(config, tokens, tokens, chunks, on_gpu),
        buffers=_BUCKET_BYTES if stage >= 2 else 0.0,
    )


def whole_parameters(model: ModelConfig, unit: str) -> int:
    """Counts the parameters of a unit that tensor parallelism does not cut.

    Gains, boundary detector and concept pool are whole on every process of a group.

    Args:
        model: shape of the model.
        unit: name of the unit.

    Returns:
        Their number.
    """
    kind = unit.partition(".")[0]
    d, c = model.d_token, model.d_concept
    if kind == "token_embedding":
        return 0
    if kind == "lm_head":
        return d
    if kind == READER:
        return c + d + c + 2 * model.token_head_size
    if kind == SEGMENTATION:
        units = model_units(model, 1)
        return next(member.parameters for member in units if member.name == SEGMENTATION)
    width, head = (c, model.concept_head_size) if kind == "backbone" else (d, model.token_head_size)
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
    if chunks is None:
        chunks = [HeldChunk(tuple(model_units(config.model, config.data.seq_len)))]
    held, working = 0.0, 0.0
    segmented = any(unit.name == SEGMENTATION for chunk in chunks for unit in chunk.units)
    for chunk in chunks:
        kept = [
            (unit.name, _kept(config, chunk, unit, num_tokens, num_concepts, on_gpu))
            for unit in chunk.units
        ]
        sent = _sent(config, chunk, num_tokens, num_concepts)
        if not segmented and any(unit.name == READER for unit in chunk.units):
            sent += num_tokens * config.model.d_token * element_size(config)  # token states came in
        of_micro_batch = sum(size for _, size in kept) + sent
        held += chunk.in_flight * of_micro_batch
        free = 0.0
        for name, size in reversed(kept):
            made = working_bytes(config, name, num_tokens, num_concepts, on_gpu)
            working = max(working, made - free)
            free += size - (logits_bytes(config, num_tokens) if name == "lm_head" else 0.0)
    return held + working


def _kept(
    config: RunConfig,
    chunk: HeldChunk,
    unit: Unit,
    num_tokens: float,
    num_concepts: float,
    on_gpu: bool,
) -> float:
    """What a unit keeps; the first block of a stack in a chunk also rotations for all of them."""
    size = unit_activation_bytes(config, unit.name, num_tokens, num_concepts, on_gpu)
    stack = unit.name.partition(".")[0]
    first = next(member for member in chunk.units if member.name.partition(".")[0] == stack)
    if first is unit:
        size += rotation_bytes(config, stack, num_tokens, num_concepts)
    return size


def _sent(config: RunConfig, chunk: HeldChunk, num_tokens: float, num_concepts: float) -> float:
    """States that a chunk has sent on and keeps until their gradient comes."""
    last, how = chunk.units[-1], arithmetic_of(config)
    if last.name == "lm_head":
        return 0.0
    if last.stream == "concepts":
        return how.element * how.rows * num_concepts * config.model.d_concept
    return how.element * how.rows * num_tokens * config.model.d_token
