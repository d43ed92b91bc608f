"""What one layout costs: stages, memory, bubble, bytes on the wire, time of a step. No torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import InputError
from megadlcm.config import ModelConfig, RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.plan.accounting import TRAINING_PASSES, flops_per_token
from megadlcm.plan.edges import Edge, model_edges, riding_edges
from megadlcm.plan.memory import MemoryEstimate, estimate_memory, held_chunks, own_parameters
from megadlcm.plan.schedule import Schedule, pipeline_schedule
from megadlcm.plan.stages import Chunk, chunk_of, cut_chunks
from megadlcm.plan.traffic import (
    Traffic,
    counting_tensor_bytes,
    counts_first,
    data_bytes,
    rows_of_micro_batch,
    sent_by_stage,
    tensor_bytes,
)

_SIMULATED = 64
"""Micro-batches for each chunk that are simulated at most; more of them repeat the steady part."""


@dataclass(frozen=True)
class Hardware:
    """The machines of a run."""

    num_nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 1
    """Devices, and processes, of each node."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s; None means logging.peak_tflops."""
    model_flops_utilization: float = 0.4
    """Share of the peak that computation reaches while it does not wait."""
    device_memory_gib: float | None = None
    """Memory of one device in GiB; None means that it is not checked."""
    intra_node_gb: float = 300.0
    """What one device sends to others of its node, GB/s."""
    inter_node_gb: float = 50.0
    """What one device sends to other nodes, GB/s."""
    write_gb: float = 1.0
    """What a node writes to the storage of checkpoints while all of them do, GB/s."""
    failure_hours: float | None = None
    """Mean time between failures of the whole run, in hours; None where it is not stated."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage."""

    stage: int
    """Index."""
    units: tuple[str, ...]
    """First and last unit of each of its chunks, as `a .. b`."""
    flops_share: float
    """Share of the model's forward FLOPs."""
    parameters: int
    """Parameters, before tensor parallelism."""
    in_flight: tuple[int, ...]
    """Micro-batches that each of its chunks holds at the worst moment."""
    memory: MemoryEstimate
    """Bytes of one of its processes."""


@dataclass(frozen=True)
class LayoutPlan:
    """One layout on some machines."""

    data_parallel_size: int
    """Replicas."""
    micro_batches: int
    """Micro-batches of one replica in a step."""
    stages: list[StagePlan]
    """The stages."""
    imbalance: float
    """FLOPs of the heaviest stage over the mean."""
    bubble: float
    """Share of the step in which stages wait for each other, for lack of balance included."""
    traffic: Traffic
    """Bytes on the wire."""
    compute_seconds: float | None
    """Computation of a step with its bubble; None where the peak is not known."""
    counting_seconds: float | None
    """Forward pass of the encoder that counts boundaries first, see `training.ratio_statistics`."""
    tensor_seconds: float
    """Communication inside layers, which nothing hides."""
    pipeline_seconds: float
    """Messages between stages, as if nothing hid them."""
    data_seconds: float
    """All-reduce of gradients and all-gather of weights, as if nothing hid them."""

    @property
    def step_seconds(self) -> float | None:
        """Time of a step."""
        if self.compute_seconds is None or self.counting_seconds is None:
            return None
        sent = self.tensor_seconds + self.pipeline_seconds + self.data_seconds
        return self.compute_seconds + self.counting_seconds + sent

    @property
    def memory(self) -> MemoryEstimate:
        """Memory of the fullest process."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def worst_bytes(self) -> float:
        """Bytes of the fullest process if every token were a concept; often another stage's."""
        return max(stage.memory.total_worst for stage in self.stages)


def plan_layout(config: RunConfig, hardware: Hardware) -> LayoutPlan:
    """Plans the layout that a config names.

    Time of a step = computation at `model_flops_utilization` of the peak, stretched by the bubble
    of the schedule, + what a process of the busiest stage sends. Inside layers that goes at the
    bandwidth inside a node, between stages at that between nodes if there are several. Replicas
    make rings: those of one node have as many links to other nodes together, and each ring crosses
    from node to node once, so the bandwidth is that of all these links, or that inside a node if
    that is less. Nothing is assumed to overlap.

    Args:
        config: the run.
        hardware: the machines.

    Returns:
        Its cost.

    Raises:
        InputError: the layout cannot work.
    """
    parallel, size = config.parallel, config.parallel.pipeline_parallel_size
    replicas = parallel.data_parallel_size(hardware.world_size)
    micro_batches = config.training.gradient_accumulation_steps(replicas)
    cut = _cut(config, parallel.pipeline_placement)
    span, schedule = _span(cut.chunks, micro_batches)
    total = sum(chunk.flops for chunk in cut.chunks)
    stages = [_stage_plan(config, stage, cut, schedule, replicas) for stage in range(size)]
    heaviest = max(stage.flops_share for stage in stages)
    # the work of the stages together if none ever waited, in the unit of the span
    busy = TRAINING_PASSES * total * micro_batches / size
    traffic = _traffic(config, cut, replicas, micro_batches)
    intra, inter = hardware.intra_node_gb * 1e9, hardware.inter_node_gb * 1e9
    local = max(hardware.gpus_per_node // parallel.tensor_parallel_size, 1)  # replicas of a node
    # a group that does not fill nodes evenly has members in two of them
    within_node = hardware.gpus_per_node % parallel.tensor_parallel_size == 0
    return LayoutPlan(
        data_parallel_size=replicas,
        micro_batches=micro_batches,
        stages=stages,
        imbalance=heaviest * size,
        bubble=max(1.0 - busy / span, 0.0),
        traffic=traffic,
        compute_seconds=_seconds(config, hardware, span * _repeated(config)),
        counting_seconds=_seconds(config, hardware, _counting_span(config, cut, micro_batches)),
        tensor_seconds=traffic.tensor / (intra if within_node else inter),
        pipeline_seconds=traffic.pipeline / (inter if hardware.num_nodes > 1 else intra),
        data_seconds=traffic.data / (intra if replicas <= local else min(intra, inter * local)),
    )


def projected_utilization(config: RunConfig, hardware: Hardware, seconds: float) -> float | None:
    """Share of the peak that a step of so many seconds reaches, repeated work not counted."""
    peak = hardware.peak_tflops or config.logging.peak_tflops
    if peak is None:
        return None
    # repeated work is no progress: a layout that recomputes must not look better for it
    flops = flops_per_token(config.model, config.data.seq_len)["total"] * TRAINING_PASSES
    return flops * config.step_tokens / (seconds * peak * 1e12 * hardware.world_size)


def describe_layout(config: RunConfig, replicas: int) -> str:
    """Names a layout in one line."""
    parallel = config.parallel
    words = [f"tensor {parallel.tensor_parallel_size}"]
    if parallel.sequence_parallel:
        words[0] += " with sequence parallelism"
    stages = f"pipeline {parallel.pipeline_parallel_size}"
    if parallel.pipeline_parallel_size > 1:
        stages += f" {parallel.pipeline_placement}"
    words += [stages, f"data {replicas}"]
    return f"{' x '.join(words)}, ZeRO {parallel.zero_stage}, recompute {parallel.recompute}"


@dataclass(frozen=True)
class _Cut:
    """The model in chunks, which many layouts share."""

    chunks: tuple[Chunk, ...]
    """The chunks."""
    edges: tuple[Edge, ...]
    """What crosses between them."""
    riding: tuple[Edge, ...]
    """The same if token states rode along from chunk to chunk; for comparison."""
    counting: tuple[Chunk, ...]
    """Chunks of the forward pass that only counts boundaries: up to the segmentation."""


def _cut(config: RunConfig, placement: str) -> _Cut:
    parallel = config.parallel
    sizes = (parallel.pipeline_parallel_size, placement, parallel.sequence_parallel)
    return _make_cut(config.model, config.data.seq_len, *sizes)


# two caches: the search for a cut takes long and does not depend on sequence parallelism
@functools.lru_cache(maxsize=1024)
def _chunks(model: ModelConfig, seq_len: int, size: int, placement: str) -> tuple[Chunk, ...]:
    return tuple(cut_chunks(model, seq_len, size, placement))


@functools.lru_cache(maxsize=1024)
def _make_cut(
    model: ModelConfig, seq_len: int, size: int, placement: str, sequence_parallel: bool
) -> _Cut:
    chunks = _chunks(model, seq_len, size, placement)
    edges = model_edges(model, chunks, sequence_parallel)
    last, counting = chunk_of(chunks, UnitKind.SEGMENTATION), list[Chunk]()
    if last is not None:
        kinds = [unit.kind for unit in chunks[last].units]
        units = chunks[last].units[: kinds.index(UnitKind.SEGMENTATION) + 1]
        counting = [*chunks[:last], dataclasses.replace(chunks[last], units=units)]
    return _Cut(chunks, edges, riding_edges(edges), tuple(counting))


def _schedule(chunks: Sequence[Chunk], micro_batches: int) -> Schedule:
    stages, costs = (chunk.stage for chunk in chunks), (chunk.flops for chunk in chunks)
    return _simulate(tuple(stages), tuple(costs), micro_batches)


# by what it depends on: a key of chunks would hash every unit of the model for every layout
_simulate = functools.lru_cache(maxsize=4096)(pipeline_schedule)


def _stage_plan(
    config: RunConfig, stage: int, cut: _Cut, schedule: Schedule, replicas: int
) -> StagePlan:
    own = [chunk for chunk in cut.chunks if chunk.stage == stage]
    in_flight = schedule.peak_in_flight[stage]
    total = sum(chunk.flops for chunk in cut.chunks)
    held = held_chunks(cut.chunks, cut.edges, stage, in_flight)
    return StagePlan(
        stage=stage,
        units=tuple(_range(chunk) for chunk in own),
        flops_share=sum(chunk.flops for chunk in own) / total,
        parameters=sum(chunk.parameters for chunk in own),
        in_flight=in_flight,
        memory=estimate_memory(config, replicas, held),
    )


def _range(chunk: Chunk) -> str:
    first, last = chunk.units[0], chunk.units[-1]
    return first.name if first is last else f"{first.name} .. {last.name}"


def _span(chunks: Sequence[Chunk], micro_batches: int) -> tuple[float, Schedule]:
    """Time of a step in forward FLOPs of one token, and the schedule that it was taken from.

    After the first micro-batches the rest goes on at the pace that was reached.
    """
    schedule = _schedule(chunks, min(micro_batches, _SIMULATED))
    if micro_batches <= _SIMULATED:
        return schedule.makespan, schedule
    # the difference of two simulations is free of the ramps at both ends
    half = _SIMULATED // 2
    pace = (schedule.makespan - _schedule(chunks, half).makespan) / (_SIMULATED - half)
    return schedule.makespan + pace * (micro_batches - _SIMULATED), schedule


def _repeated(config: RunConfig) -> float:
    """Computation relative to that without recomputation; `block` runs blocks forward again."""
    if config.parallel.recompute != "block":
        return 1.0
    parts = flops_per_token(config.model, config.data.seq_len)
    blocks = sum(parts.get(kind.label, 0.0) for kind in UnitKind if kind.is_block)
    return 1.0 + blocks / parts["total"] / TRAINING_PASSES


def _counting_span(config: RunConfig, cut: _Cut, micro_batches: int) -> float:
    """The same for the forward pass that counts boundaries: through the stages, then the pace."""
    if not counts_first(config, micro_batches):
        return 0.0
    # forward passes only: the first micro-batch fills the stages, the slowest one sets the pace
    flops = [0.0] * config.parallel.pipeline_parallel_size
    for chunk in cut.counting:
        flops[chunk.stage] += chunk.flops
    return sum(flops) + (micro_batches - 1) * max(flops)


def _seconds(config: RunConfig, hardware: Hardware, flops: float) -> float | None:
    """Time of so many FLOPs for each token of a micro-batch; None where the peak is not known."""
    peak = hardware.peak_tflops or config.logging.peak_tflops
    if peak is None:
        return None
    rate = peak * 1e12 * hardware.model_flops_utilization * config.parallel.tensor_parallel_size
    return flops * rows_of_micro_batch(config)[0] / rate


def _traffic(config: RunConfig, cut: _Cut, replicas: int, micro_batches: int) -> Traffic:
    size, rows = config.parallel.pipeline_parallel_size, rows_of_micro_batch(config)
    tensor, own = [0.0] * size, [0.0] * size
    for chunk in cut.chunks:
        for kind, count in chunk.kinds.items():
            tensor[chunk.stage] += count * tensor_bytes(config, kind, *rows)
        own[chunk.stage] += own_parameters(config, chunk)
    if counts_first(config, micro_batches):
        for chunk in cut.counting:
            for kind, count in chunk.kinds.items():
                tensor[chunk.stage] += count * counting_tensor_bytes(config, kind, rows[0])
    sent = _sent_by_stage(config, cut.chunks, cut.edges, micro_batches)
    linear = _cut(config, "linear")
    try:
        fold = _cut(config, "folded")
        folded = sum(_sent_by_stage(config, fold.chunks, fold.edges, micro_batches))
    except InputError:  # too few units for so many chunks; the own layout is none the worse
        folded = None
    # the busiest process decides, which may be another one on each axis
    return Traffic(
        tensor=max(tensor) * micro_batches,
        pipeline=max(sent),
        data=max(data_bytes(config, count, replicas, micro_batches) for count in own),
        pipeline_total=sum(sent),
        pipeline_straight=sum(_sent_by_stage(config, linear.chunks, linear.edges, micro_batches)),
        pipeline_riding=sum(_sent_by_stage(config, linear.chunks, linear.riding, micro_batches)),
        pipeline_folded=folded,
    )


def _sent_by_stage(
    config: RunConfig, chunks: Sequence[Chunk], edges: Sequence[Edge], micro_batches: int
) -> list[float]:
    """Bytes of a step that one process of each stage sends to other stages."""
    rows, counts = rows_of_micro_batch(config), counts_first(config, micro_batches)
    sent = sent_by_stage(config, chunks, edges, *rows, counts)
    return [micro_batches * num_bytes for num_bytes in sent]
