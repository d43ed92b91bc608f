"""Brings tensors that are spread over processes together, for checkpoints."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import Part
from megadlcm.parallel.watch.watchdog import doing


def gather_pieces(own: Tensor, dimension: int, mesh: ParallelMesh) -> Tensor:
    """Puts the pieces of a tensor parallel group together, on every process of it.

    Args:
        own: this process's piece.
        dimension: the dimension that was cut.
        mesh: ranks of this process.

    Returns:
        The whole tensor.
    """
    if mesh.tensor_parallel_size == 1:
        return own
    pieces = [torch.empty_like(own) for _ in range(mesh.tensor_parallel_size)]
    with doing("tensor parallel gather of a parameter"):
        dist.all_gather(pieces, own.contiguous(), group=mesh.tensor_parallel_group)
    return torch.cat(pieces, dimension)


def bring_to_first_stage(whole: Tensor | None, part: Part, mesh: ParallelMesh) -> Tensor | None:
    """Sends a tensor from its stage to the first one.

    To be called by the processes of one place on all stages, for each tensor in the same order.

    Args:
        whole: the tensor, None on stages that do not hold it.
        part: its place and shape.
        mesh: ranks of this process.

    Returns:
        The tensor on the first stage, None on others.
    """
    if part.stage == 0:
        return whole if mesh.pipeline_rank == 0 else None
    group = mesh.pipeline_group(part.stage, 0) if mesh.pipeline_rank in (0, part.stage) else None
    if mesh.pipeline_rank == part.stage:
        assert whole is not None
        with doing(f"pipeline send of {part.name}"):
            dist.send(whole.float().contiguous(), mesh.rank_of_stage(0), group=group)
        return None
    if mesh.pipeline_rank == 0:
        received = torch.empty(part.shape, dtype=torch.float32, device=mesh.device)
        with doing(f"pipeline receive of {part.name} from stage {part.stage}"):
            dist.recv(received, mesh.rank_of_stage(part.stage), group=group)
        return received
    return None
