"""Ranks, sizes and groups of a process on the axes of the run, and collectives over them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.watch.watchdog import doing


@dataclass(frozen=True)
class ParallelMesh:
    """Ranks, sizes and groups of this process on the axes of the run.

    rank = (pipeline_rank * data_parallel_size + data_parallel_rank) * tensor_parallel_size
    + tensor_parallel_rank: processes that share a layer are neighbours, stages are far apart.
    A group is None where its axis has one process.
    """

    rank: int
    """Index of this process."""
    world_size: int
    """Processes of the run."""
    local_rank: int
    """Index of this process on its node."""
    device: torch.device
    """Where this process computes."""
    tensor_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_parallel_size: int = 1
    """Stages."""
    tensor_parallel_group: dist.ProcessGroup | None = None
    """Processes that share this one's layers."""
    data_parallel_group: dist.ProcessGroup | None = None
    """Processes that hold the same part of the model."""
    model_parallel_group: dist.ProcessGroup | None = None
    """Processes that hold one replica of the model together."""
    pipeline_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """Processes with this one's place on all stages, once for messages to later stages and once
    for those to earlier ones: on one NCCL group a send and a receive would wait for each other."""

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def tensor_parallel_rank(self) -> int:
        """Which part of each layer this process holds."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_rank(self) -> int:
        """Which stage this process is."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)

    @property
    def is_writer(self) -> bool:
        """Whether this process writes metrics, samples and the commit mark of a checkpoint."""
        return self.rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this process reads the samples of its replica and hands them to the others."""
        return self.tensor_parallel_rank == 0 and self.pipeline_rank == 0

    def rank_of_stage(self, stage: int) -> int:
        """The process with this one's place in its layers and replicas, on another stage."""
        per_stage = self.tensor_parallel_size * self.data_parallel_size
        return stage * per_stage + self.rank % per_stage

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Adds a tensor over all replicas, in place, without a gradient; returns the tensor."""
        if self.data_parallel_size > 1:
            with doing("data parallel sum"):
                dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def sum_over_run(self, values: Tensor) -> Tensor:
        """Adds what each process contributes to the whole run, in place.

        What the processes of a tensor parallel group know alike is counted on the first of them.
        """
        if self.tensor_parallel_rank:
            values.zero_()
        return self.sum_everywhere(values)

    def sum_everywhere(self, values: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place."""
        if self.world_size > 1:
            with doing("sum over all processes"):
                dist.all_reduce(values)
        return values

    def gather_over_data_parallel(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each replica, in order, on every replica."""
        if self.data_parallel_size == 1:
            return [value]
        values: list[Any] = [None] * self.data_parallel_size
        with doing("data parallel gather"):
            dist.all_gather_object(values, value, group=self.data_parallel_group)
        return values

    def gather_over_run(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each process, in rank order, everywhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with doing("gather over the run"):
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Hands the value of rank 0 to every process."""
        if self.world_size == 1:
            return value
        values = [value]
        with doing("broadcast from rank 0"):
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def pipeline_group(self, source: int, target: int) -> dist.ProcessGroup:
        """The group for messages from one stage to another."""
        assert self.pipeline_groups is not None
        return self.pipeline_groups[0 if source < target else 1]

    def gather_over_pipeline(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each stage of this process's replica."""
        if self.pipeline_groups is None:
            return [value]
        values: list[Any] = [None] * self.pipeline_parallel_size
        with doing("pipeline gather"):
            dist.all_gather_object(values, value, group=self.pipeline_groups[0])
        return values

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            with doing("barrier"):
                dist.barrier()


def make_mesh(
    launch: LaunchEnvironment,
    device: torch.device,
    tensor_size: int,
    pipeline_size: int,
    timeout: timedelta | None = None,
) -> ParallelMesh:
    """Makes the groups of each axis; collective, the process group must exist.

    Args:
        launch: rank and sizes of this process.
        device: where it computes.
        tensor_size: processes that share each layer.
        pipeline_size: stages.
        timeout: of a collective in these groups, which do not inherit it; None leaves the
            back-end's own.

    Returns:
        Ranks and groups of this process.
    """
    mesh = ParallelMesh(
        launch.rank, launch.world_size, launch.local_rank, device, tensor_size, pipeline_size
    )
    places = range(mesh.world_size)
    others = [
        ParallelMesh(rank, mesh.world_size, 0, device, tensor_size, pipeline_size)
        for rank in places
    ]
    same_layers = [
        other.rank
        for other in others
        if (other.pipeline_rank, other.data_parallel_rank)
        == (mesh.pipeline_rank, mesh.data_parallel_rank)
    ]
    same_part = [
        other.rank
        for other in others
        if (other.pipeline_rank, other.tensor_parallel_rank)
        == (mesh.pipeline_rank, mesh.tensor_parallel_rank)
    ]
    same_replica = [
        other.rank for other in others if other.data_parallel_rank == mesh.data_parallel_rank
    ]
    same_place = [mesh.rank_of_stage(stage) for stage in range(pipeline_size)]
    pipeline_groups = None
    if pipeline_size > 1:
        forward = _group(same_place, timeout, "forward")
        pipeline_groups = (forward, _group(same_place, timeout, "backward"))
    return dataclasses.replace(
        mesh,
        tensor_parallel_group=_group(same_layers, timeout) if tensor_size > 1 else None,
        data_parallel_group=_group(same_part, timeout),
        model_parallel_group=_group(same_replica, timeout),
        pipeline_groups=pipeline_groups,
    )


_groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}


def _group(
    ranks: list[int], timeout: timedelta | None, use: str = "collectives"
) -> dist.ProcessGroup:
    """A group of these ranks for one use, made once; only its members take part in making it."""
    key = (use, tuple(ranks))
    if key not in _groups:
        # torch names such a group after its ranks: a second one needs a description of its own
        with doing("making of a process group"):
            group = dist.new_group(
                ranks, timeout=timeout, use_local_synchronization=True, group_desc=use
            )
        assert isinstance(group, dist.ProcessGroup)
        _groups[key] = group
    return _groups[key]


def forget_groups() -> None:
    """Forgets the groups that were made, where the process group they belong to ends."""
    _groups.clear()
