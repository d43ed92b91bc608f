"""Makes the process groups of the axes of a run, each once."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from operator import attrgetter

import torch
import torch.distributed as dist

from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.watch.activity import doing

_groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
"""Groups of the process group that exists, by use and ranks."""


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
    same_layers = _peers(mesh, "pipeline_rank", "data_parallel_rank")
    same_shard = _peers(mesh, "pipeline_rank", "tensor_parallel_rank")
    same_replica = _peers(mesh, "data_parallel_rank")
    same_place = _peers(mesh, "data_parallel_rank", "tensor_parallel_rank")
    pipeline_groups = None
    # every process makes the groups of one kind before those of the next: two that made theirs in
    # different orders would wait for each other
    if pipeline_size > 1:
        forward = _group(same_place, timeout, "forward")
        pipeline_groups = (forward, _group(same_place, timeout, "backward"))
    return dataclasses.replace(
        mesh,
        tensor_parallel_group=_group(same_layers, timeout) if tensor_size > 1 else None,
        # also of a single process: DeepSpeed asks for these two, and takes None for all of them
        data_parallel_group=_group(same_shard, timeout),
        model_parallel_group=_group(same_replica, timeout),
        pipeline_groups=pipeline_groups,
    )


def _peers(mesh: ParallelMesh, *coordinates: str) -> list[int]:
    """Ranks, in order, that have these coordinates in common with a process."""
    place = attrgetter(*coordinates)
    every = (dataclasses.replace(mesh, rank=rank) for rank in range(mesh.world_size))
    return [other.rank for other in every if place(other) == place(mesh)]


def _group(
    ranks: list[int], timeout: timedelta | None, use: str = "collectives"
) -> dist.ProcessGroup:
    """A group of these ranks for one use, made once; only its members take part in making it."""
    key = (use, tuple(ranks))
    if key not in _groups:
        # torch names such a group after its ranks: a second one needs a description of its own
        with doing("creation of a process group"):
            group = dist.new_group(
                ranks, timeout=timeout, use_local_synchronization=True, group_desc=use
            )
        assert isinstance(group, dist.ProcessGroup)
        _groups[key] = group
    return _groups[key]


def forget_groups() -> None:
    """Forgets the groups that were made, where the process group they belong to ends."""
    _groups.clear()
