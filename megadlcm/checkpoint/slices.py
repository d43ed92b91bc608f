"""Which slices of the training state this process holds, and which of them it saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.index import Piece, Range, Shape
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import master_parts, saved_buffers, state_keys
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import Partition, ShardSpec


@dataclass(frozen=True)
class Slice:
    """A slice that this process holds."""

    part: Range
    """Which elements it has."""
    views: dict[str, Tensor]
    """They themselves, by `master` and kind of optimizer state: fp32 (len(part),), live."""


def own_slices(engine: TrainingEngine, share: bool) -> list[Slice]:
    """Finds what this process holds of parameters, optimizer state and saved buffers.

    No communication, no copies. Parameters come first, in the order of the whole model.

    Args:
        engine: the engine; its optimizer state is there after the first step.
        share: whether processes that hold the same elements share them out, so that each element
            of the whole model is in one slice of one process; else all that this process holds.

    Returns:
        The slices, of at least one element each.
    """
    mesh, specs = engine.mesh, engine.partition.specs
    keys, _ = state_keys(engine)
    replicated = engine.zero_optimizer is None  # else each replica has a range of its own
    found: list[Slice] = []
    for held in master_parts(engine):
        spec = specs[held.name]
        part = Range(held.name, piece_of(spec, mesh), held.start, held.stop)
        state = engine.optimizer.state.get(held.owner, {})
        views = {MASTER: held.values()} | {key: held.values(state[key]) for key in keys}
        own = _share(part, mesh, replicated, spec.dimension is None) if share else part
        found.append(_narrowed(part, own, views))
    for name, buffer in saved_buffers(engine.model):
        assert buffer.dtype == torch.float32, f"buffer {name} is no fp32"
        part = Range(name, piece_of(specs[name], mesh), 0, buffer.numel())
        own = _share(part, mesh, True, True) if share else part
        found.append(_narrowed(part, own, {MASTER: buffer.detach().view(-1)}))
    order = {name: number for number, name in enumerate(ordered_names(engine.partition))}
    found.sort(key=lambda each: (order[each.part.tensor], each.part.start))
    return [each for each in found if len(each.part)]


def _share(part: Range, mesh: ParallelMesh, over_replicas: bool, over_shards: bool) -> Range:
    """This process's share of a range that others hold as well."""
    index, count = 0, 1
    if over_replicas:
        index, count = mesh.data_parallel_rank, mesh.data_parallel_size
    if over_shards:
        size = mesh.tensor_parallel_size
        index, count = index * size + mesh.tensor_parallel_rank, count * size
    return part.part(index, count)


def _narrowed(part: Range, own: Range, views: dict[str, Tensor]) -> Slice:
    start, length = own.start - part.start, len(own)
    return Slice(own, {key: view[start : start + length] for key, view in views.items()})


def piece_of(spec: ShardSpec, mesh: ParallelMesh) -> Piece:
    """The box of a tensor that a tensor parallel process holds."""
    shape: Shape = tuple(spec.shape)
    offset = [0] * len(shape)
    if spec.dimension is not None:
        extent = shape[spec.dimension] // mesh.tensor_parallel_size
        offset[spec.dimension] = extent * mesh.tensor_parallel_rank
        shape = (*shape[: spec.dimension], extent, *shape[spec.dimension + 1 :])
    return Piece(tuple(offset), shape)


def ordered_names(partition: Partition) -> list[str]:
    """Every tensor of the whole model: parameters, then saved buffers."""
    return sorted(partition.specs, key=lambda name: not partition.specs[name].is_parameter)


def whole_shapes(partition: Partition) -> dict[str, Shape]:
    """Shapes of whole tensors by name, in the order of `ordered_names`."""
    return {name: tuple(partition.specs[name].shape) for name in ordered_names(partition)}


def count_elements(partition: Partition) -> int:
    """Elements of all tensors of the whole model."""
    return sum(math.prod(shape) for shape in whole_shapes(partition).values())
