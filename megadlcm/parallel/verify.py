"""Builds what every process of a layout would hold, without memory, and compares it with the plan.

One process plays them one after the other: groups come from torch's fake back-end, which knows
ranks and sizes and sends nothing, and the modules are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig
from megadlcm.model import build_model
from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.groups import make_mesh
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import Partition, build_stage_model, make_partition
from megadlcm.parallel.process_group import leave_process_group
from megadlcm.plan.activations import element_size
from megadlcm.plan.memory import HeldChunk, estimate_memory, whole_parameters
from megadlcm.plan.stages import Unit


class MismatchError(RuntimeError):
    """A process would hold something else than the plan says."""


@dataclass
class Verified:
    """What was compared; everything agreed."""

    processes: int = 0
    """Processes that were built: every stage and tensor parallel rank, of the first replica."""
    tensors: int = 0
    """Parameters of all of them."""
    weight_bytes: dict[str, float] = field(default_factory=dict)
    """Bytes of weights in the arithmetic, before ZeRO, by `stage.tensor rank`."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "processes": self.processes,
            "tensors": self.tensors,
            "weight_bytes": self.weight_bytes,
        }

    def render(self) -> str:
        return (
            f"verified: names, shapes and bytes of {self.tensors:,} tensors of "
            f"{self.processes} processes (all stages x tensor parallel ranks)"
        )


def verify_layout(config: RunConfig, world_size: int) -> Verified:
    """Builds every stage and tensor parallel rank of the first replica and compares.

    Each parameter of the model must be held by exactly one stage; there either whole by every
    process, or in equal parts that make it up; units must have as many as the plan counts, and
    the bytes must be those of the memory formula. Other replicas hold the same.

    Args:
        config: the run.
        world_size: processes of the run.

    Returns:
        What was compared.

    Raises:
        MismatchError: something differs.
        InputError: this process already belongs to a process group.
    """
    if dist.is_initialized():
        raise InputError(
            "--verify needs a process of its own, this one already joined a run", key="--verify"
        )
    partition, parallel = make_partition(config), config.parallel
    # what the model is, known from the model itself and not from the plan that is compared
    shapes = _whole_shapes(config)
    replicas, result = parallel.data_parallel_size(world_size), Verified()
    shards: dict[str, list[tuple[int, int, torch.Size]]] = {name: [] for name in shapes}
    for stage in range(parallel.pipeline_parallel_size):
        for tensor_rank in range(parallel.tensor_parallel_size):
            # the first replica: its tensor parallel ranks are neighbours, its stages far apart
            rank = stage * replicas * parallel.tensor_parallel_size + tensor_rank
            with _playing(config, rank, world_size) as mesh:
                _check((mesh.pipeline_rank, mesh.tensor_parallel_rank), (stage, tensor_rank), rank)
                model = build_stage_model(config, mesh, partition, "meta")
            held = dict(model.named_parameters())
            _check_process(config, partition, stage, held, rank)
            for name, parameter in held.items():
                if name not in shards:
                    raise MismatchError(f"rank {rank} holds {name}, which the model does not have")
                shards[name].append((stage, rank, parameter.shape))
            result.processes += 1
            result.tensors += len(held)
            num_bytes = element_size(config) * sum(p.numel() for p in held.values())
            result.weight_bytes[f"{stage}.{tensor_rank}"] = num_bytes
    for name, shape in shapes.items():
        _check_shards(name, shape, shards[name], parallel.tensor_parallel_size)
    return result


@contextmanager
def _playing(config: RunConfig, rank: int, world_size: int) -> Iterator[ParallelMesh]:
    """The mesh of one rank, over groups that send nothing."""
    parallel = config.parallel
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield make_mesh(
            LaunchEnvironment(rank, world_size),
            torch.device("cpu"),
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
        )
    finally:
        leave_process_group()


def _whole_shapes(config: RunConfig) -> dict[str, torch.Size]:
    model = build_model(config.model, config.mup, device="meta")
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _check_process(
    config: RunConfig, partition: Partition, stage: int, held: dict[str, Any], rank: int
) -> None:
    """Names and numbers of each unit, and bytes of the process, against the formulas."""
    chunks, left = partition.own_chunks(stage), dict[str, Tensor](held)
    for unit in (unit for chunk in chunks for unit in chunk.units):
        names = [name for name in left if _belongs(name, unit)]
        whole = whole_parameters(config.model, unit.kind)
        expected = whole + (unit.parameters - whole) // config.parallel.tensor_parallel_size
        # popped, so that a parameter which two units claim is missing in the second
        found = sum(left.pop(name).numel() for name in names)
        _check(found, expected, rank, f"parameters of {unit.name}")
    _check(sorted(left), [], rank, "parameters of other stages")
    # of one replica, so that ZeRO divides nothing
    memory = estimate_memory(config, 1, [HeldChunk(chunk) for chunk in chunks])
    num_bytes = element_size(config) * sum(parameter.numel() for parameter in held.values())
    _check(num_bytes, memory.parameters, rank, "bytes of weights")


def _belongs(name: str, unit: Unit) -> bool:
    return any(name.startswith(f"{prefix}.") for prefix in unit.modules)


def _check_shards(
    name: str, shape: torch.Size, shards: list[tuple[int, int, torch.Size]], size: int
) -> None:
    """One stage holds the parameter: whole on each of its processes, or sharded along one dim."""
    stages = {stage for stage, _, _ in shards}
    if len(stages) != 1 or len(shards) != size:
        raise MismatchError(f"{name} is held by stages {sorted(stages)}, must be by one, {size}x")
    for _, rank, found in shards:
        # equal shards only: DeepSpeed and checkpoints know no others
        differing = [dim for dim in range(len(shape)) if found[dim] != shape[dim]]
        if found != shards[0][2] or len(differing) > 1:
            raise MismatchError(f"rank {rank}: {name} is {tuple(found)}, whole {tuple(shape)}")
        if differing and found[differing[0]] * size != shape[differing[0]]:
            raise MismatchError(
                f"rank {rank}: {name} is {tuple(found)}, must be 1/{size} of {tuple(shape)}"
            )


def _check(found: Any, expected: Any, rank: int, what: str = "place in the layout") -> None:
    if found != expected:
        raise MismatchError(f"rank {rank}: {what}: found {found}, the plan says {expected}")
