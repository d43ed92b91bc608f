"""Brings tensors that are spread over processes together, for checkpoints."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import ShardSpec
from megadlcm.parallel.watch.activity import doing


def all_gather_shards(own: Tensor, dimension: int, mesh: ParallelMesh) -> Tensor:
    """Puts the shards of a tensor parallel group together, on every process of it.

    Args:
        own: this process's shard.
        dimension: the dimension of the shards.
        mesh: ranks of this process.

    Returns:
        The whole tensor.
    """
    if mesh.tensor_parallel_size == 1:
        return own
    shards = [torch.empty_like(own) for _ in range(mesh.tensor_parallel_size)]
    with doing("tensor parallel all-gather of a parameter"):
        dist.all_gather(shards, own.contiguous(), group=mesh.tensor_parallel_group)
    return torch.cat(shards, dimension)


def bring_to_first_stage(
    whole: Tensor | None, spec: ShardSpec, mesh: ParallelMesh
) -> Tensor | None:
    """Sends a tensor from its stage to the first one.

    To be called by the processes of one place on all stages, for each tensor in the same order.

    Args:
        whole: the tensor, None on stages that do not hold it.
        spec: its place and shape.
        mesh: ranks of this process.

    Returns:
        The tensor on the first stage, None on others.
    """
    if spec.stage == 0:
        return whole if mesh.pipeline_rank == 0 else None
    group = mesh.pipeline_group(spec.stage, 0) if mesh.pipeline_rank in (0, spec.stage) else None
    if mesh.pipeline_rank == spec.stage:
        assert whole is not None
        # fp32 on the wire: the receiver knows the shape, and not what this stage computes in
        with doing(f"pipeline send of {spec.name}"):
            dist.send(whole.float().contiguous(), mesh.rank_of_stage(0), group=group)
        return None
    if mesh.pipeline_rank == 0:
        received = torch.empty(spec.shape, dtype=torch.float32, device=mesh.device)
        with doing(f"pipeline recv of {spec.name} from stage {spec.stage}"):
            dist.recv(received, mesh.rank_of_stage(spec.stage), group=group)
        return received
    return None
