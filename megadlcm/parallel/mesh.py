"""Ranks, sizes and groups of a process on the axes of the run, and collectives over them.

| axis          | all-reduce                       | all-gather                  |
|---------------|----------------------------------|-----------------------------|
| run           | `sum_everywhere`, `sum_over_run` | `gather_over_run`           |
| data parallel | `sum_over_data_parallel`         | `gather_over_data_parallel` |
| pipeline      |                                  | `gather_over_pipeline`      |

Collectives inside a layer, with gradients, are in `collectives`; what `pipeline` sends, there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.parallel.watch.activity import doing


class Axis(NamedTuple):
    """The processes over which a collective runs; without a sound where there is one only."""

    name: str
    """In messages about processes that do not come."""
    size: int
    """How many they are."""
    group: dist.ProcessGroup | None
    """None means all processes of the run."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """Adds a tensor up in place, without a gradient; returns it."""
        if self.size > 1:
            with doing(f"{self.name} all-reduce"):
                dist.all_reduce(values, group=self.group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """One small picklable value of each process, in order."""
        if self.size == 1:
            return [value]
        # pickled and sent twice, sizes first: for a few values at a time, never inside of a step
        values: list[Any] = [None] * self.size
        with doing(f"{self.name} all-gather"):
            dist.all_gather_object(values, value, group=self.group)
        return values


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
    """Processes that hold the same shard of the model."""
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
        """Which shard of each layer this process holds."""
        return self.rank % self.tensor_parallel_size  # the fastest axis: neighbours, on one node

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
        # the storage is asked once, however many processes share a model
        return self.tensor_parallel_rank == 0 and self.pipeline_rank == 0

    def rank_at(self, stage: int, data_parallel_rank: int, tensor_parallel_rank: int) -> int:
        """The process at a place of the run."""
        replica = stage * self.data_parallel_size + data_parallel_rank
        return replica * self.tensor_parallel_size + tensor_parallel_rank

    def rank_of_stage(self, stage: int) -> int:
        """The process with this one's place in its layers and replicas, on another stage."""
        return self.rank_at(stage, self.data_parallel_rank, self.tensor_parallel_rank)

    def replica_ranks(self) -> list[tuple[int, int]]:
        """Rank and stage of every process of this replica, in rank order."""
        return [
            (self.rank_at(stage, self.data_parallel_rank, part), stage)
            for stage in range(self.pipeline_parallel_size)
            for part in range(self.tensor_parallel_size)
        ]

    @property
    def run(self) -> Axis:
        """All processes."""
        return Axis("run", self.world_size, None)

    @property
    def data_parallel(self) -> Axis:
        """Those that hold the same shard of the model."""
        return Axis("data parallel", self.data_parallel_size, self.data_parallel_group)

    @property
    def pipeline(self) -> Axis:
        """Those with the same place on all stages."""
        groups = self.pipeline_groups  # both have the same members
        # without one a collective would go over the whole run
        assert groups is not None or self.pipeline_parallel_size == 1
        return Axis("pipeline", self.pipeline_parallel_size, groups[0] if groups else None)

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Adds a tensor over all replicas, in place, without a gradient; returns the tensor."""
        return self.data_parallel.all_reduce(values)

    def sum_over_run(self, values: Tensor) -> Tensor:
        """Adds what each process contributes to the whole run, in place.

        What the processes of a tensor parallel group know alike is counted on the first of them.
        """
        # all take part nevertheless: a collective waits for every process of its group
        if self.tensor_parallel_rank:
            values.zero_()
        return self.sum_everywhere(values)

    def sum_everywhere(self, values: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place."""
        return self.run.all_reduce(values)

    def gather_over_data_parallel(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each replica, in order, on every replica."""
        return self.data_parallel.all_gather(value)

    def gather_over_run(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each process, in rank order, everywhere."""
        return self.run.all_gather(value)

    def gather_over_pipeline(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each stage of this process's replica."""
        return self.pipeline.all_gather(value)

    def broadcast_object(self, value: Any) -> Any:
        """Hands the value of rank 0 to every process."""
        if self.world_size == 1:
            return value
        values = [value]
        with doing("broadcast from rank 0"):
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            with doing("barrier"):
                dist.barrier()

    def pipeline_group(self, source: int, target: int) -> dist.ProcessGroup:
        """The group for messages from one stage to another."""
        assert self.pipeline_groups is not None
        return self.pipeline_groups[0 if source < target else 1]
