"""The reference for checkpoints: whole tensors, gathered one after another to the host of rank 0.

Every function is collective.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.engine import masters
from megadlcm.engine.engine import TrainingEngine
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import ShardSpec
from megadlcm.parallel.watch.activity import doing


def read_model(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies parameters (fp32 masters) and buffers to the host of rank 0.

    Args:
        engine: the engine.

    Returns:
        Whole tensors by name; empty on processes that do not write.
    """
    own = dict(engine.model.named_parameters())
    buffers = dict(masters.saved_buffers(engine.model))
    tensors = {}
    # the names of the whole model in one order, also those of other stages: what follows is a
    # collective for each, and processes in different orders would exchange different tensors
    for name, part in engine.partition.specs.items():
        value = None
        if name in own:
            parameter = own[name]
            value = parameter if engine.zero_optimizer is None else _get(engine, parameter)
        elif name in buffers:
            value = buffers[name]
        whole = collect(engine, part, value)
        if whole is not None:
            tensors[name] = whole
    return tensors


def read_optimizer(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies the optimizer state to the host of rank 0, as `<parameter>.<key>`.

    Args:
        engine: the engine.

    Returns:
        Whole tensors by name; empty on processes that do not write, and for an optimizer without
        state.
    """
    masters.link_states(engine)
    own = {name: (parameter, owner) for name, parameter, owner in masters.owners_of(engine)}
    # a stage without parameters knows no keys, and has to take part nevertheless
    held = [sorted(engine.optimizer.state.get(owner, {})) for _, owner in own.values()]
    keys = sorted(
        {key for keys in engine.mesh.gather_over_pipeline(held) for k in keys for key in k}
    )
    tensors = {}
    for name, part in engine.partition.specs.items():
        if not part.is_parameter:
            continue
        for key in keys:
            value = None
            if name in own:
                parameter, owner = own[name]
                state = engine.optimizer.state[owner]
                partitioned = key != masters.STEP_KEY and engine.zero_optimizer is not None
                value = _get(engine, parameter, key) if partitioned else state[key]
            if key == masters.STEP_KEY:  # a count, the same on every process and never partitioned
                part_of_key = dataclasses.replace(part, shape=torch.Size(()), dimension=None)
                whole = collect(engine, part_of_key, value)
            else:
                whole = collect(engine, part, value)
            if whole is not None:
                tensors[f"{name}.{key}"] = whole
    return tensors


def collect(engine: TrainingEngine, part: ShardSpec, value: Tensor | None) -> Tensor | None:
    """Puts the shards of a tensor together and brings it to rank 0; collective.

    Args:
        engine: the engine.
        part: where the tensor lives.
        value: this process's shard of it, None on other stages.

    Returns:
        The whole tensor on the host of rank 0, None elsewhere.
    """
    mesh = engine.mesh
    if value is not None:
        value = value.detach()
        # all of a group take part, and all replicas alike: their masters were collected just so
        if part.dimension is not None:
            value = _all_gather_shards(value, part.dimension, mesh)
    if mesh.data_parallel_rank or mesh.tensor_parallel_rank:
        return None
    value = _bring_to_first_stage(value, part, mesh)
    return None if value is None else _on_host(value)


def _get(engine: TrainingEngine, parameter: Any, key: str | None = None) -> Tensor:
    """Collects the fp32 master of a partitioned parameter, or an entry of its optimizer state."""
    zero: Any = engine.zero_optimizer
    if engine.zero_stage == 3:
        return zero.get_full_hp_param(parameter, key)
    return parameter.get_full_hp_param(key)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _all_gather_shards(own: Tensor, dimension: int, mesh: ParallelMesh) -> Tensor:
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


def _bring_to_first_stage(
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
