"""Master parameters and optimizer state by parameter name, whatever DeepSpeed did to them.

Under ZeRO the optimizer sees flat fp32 partitions of parameter groups. DeepSpeed knows the place of
each parameter in them: stages 1 and 2 hang the means to read and write it on the parameter itself
(`get_full_hp_param`, `set_full_hp_param`), stage 3 on its optimizer. Through them a checkpoint
holds whole tensors under their names, which any layout can read: shards of a tensor parallel group
are put together and other stages send theirs to rank 0. Reading and writing are collective: every
process must call them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadlcm.engine.engine import TrainingEngine
from megadlcm.parallel.partition import ShardSpec, shard
from megadlcm.parallel.transfer import all_gather_shards, bring_to_first_stage
from megadlcm.parallel.watch.activity import doing

STEP_KEY = "step"


def read_model(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies parameters (fp32 masters) and buffers to the host of rank 0.

    Args:
        engine: the engine.

    Returns:
        Whole tensors by name; empty on processes that do not write.
    """
    own = dict(engine.model.named_parameters())
    buffers = dict(saved_buffers(engine.model))
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
        whole = _collect(engine, part, value)
        if whole is not None:
            tensors[name] = whole
    return tensors


def write_model(engine: TrainingEngine, tensors: Mapping[str, Tensor]) -> None:
    """Sets parameters, fp32 masters and buffers; the inverse of `read_model`.

    Args:
        engine: the engine.
        tensors: whole tensors by name, complete.
    """
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            value = _own_shard(engine, name, tensors[name])
            if engine.zero_optimizer is None:
                parameter.copy_(value)
            else:
                _set(engine, parameter, value)
        # under ZeRO only the fp32 masters are set by now
        follow_masters(engine)
        for name, buffer in saved_buffers(engine.model):
            buffer.copy_(tensors[name])


def read_optimizer(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies the optimizer state to the host of rank 0, as `<parameter>.<key>`.

    Args:
        engine: the engine.

    Returns:
        Whole tensors by name; empty on processes that do not write, and for an optimizer without
        state.
    """
    _link_states(engine)
    own = {name: (parameter, owner) for name, parameter, owner in _owners(engine)}
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
                partitioned = key != STEP_KEY and engine.zero_optimizer is not None
                value = _get(engine, parameter, key) if partitioned else state[key]
            if key == STEP_KEY:  # a count, the same on every process and never partitioned
                part_of_key = dataclasses.replace(part, shape=torch.Size(()), dimension=None)
                whole = _collect(engine, part_of_key, value)
            else:
                whole = _collect(engine, part, value)
            if whole is not None:
                tensors[f"{name}.{key}"] = whole
    return tensors


def write_optimizer(engine: TrainingEngine, tensors: Mapping[str, Tensor]) -> None:
    """Sets the optimizer state; the inverse of `read_optimizer`.

    Args:
        engine: the engine, fresh or not.
        tensors: whole tensors named `<parameter>.<key>`, complete.
    """
    keys = sorted({name.rsplit(".", 1)[1] for name in tensors})
    if not keys:
        return
    owners = list(_owners(engine))
    # states of the right shapes first: DeepSpeed can write into places, and makes none by itself
    for name, _, owner in owners:
        engine.optimizer.state[owner] = {
            key: tensors[f"{name}.{key}"].to(owner.device).clone()
            if key == STEP_KEY
            else torch.zeros_like(owner, requires_grad=False)
            for key in keys
        }
    _link_states(engine)
    for name, parameter, owner in owners:
        for key in keys:
            if key == STEP_KEY:
                continue  # set above
            value = _own_shard(engine, name, tensors[f"{name}.{key}"])
            if engine.zero_optimizer is None:
                engine.optimizer.state[owner][key].copy_(value)
            else:
                _set(engine, parameter, value, key)


@dataclass(frozen=True)
class MasterPart:
    """A range of a parameter's shard whose fp32 master this process has, and where."""

    name: str
    """Of the parameter."""
    start: int
    """First element, flat in this process's shard of the parameter."""
    stop: int
    """End."""
    owner: Tensor
    """Under which the optimizer keeps the state; holds the masters of the range."""
    offset: int
    """Where the range begins in it, flat."""

    def values(self, whole: Tensor | None = None) -> Tensor:
        """The range as a view: of the masters, or of a state tensor of the owner's shape."""
        whole = self.owner if whole is None else whole
        return whole.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


def master_parts(engine: TrainingEngine) -> Iterator[MasterPart]:
    """Where this process has fp32 masters; no communication, no copies.

    Where DeepSpeed keeps them differs by stage: the parameters themselves (0), flat partitions of
    groups of parameters (1, 2), ranges of each parameter in flat sub-groups (3).
    """
    zero: Any = engine.zero_optimizer
    for name, parameter, owner in _owners(engine):
        address: Any = parameter
        if zero is None:
            yield MasterPart(name, 0, parameter.numel(), parameter, 0)
        elif engine.zero_stage == 3:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            size = address.partition_numel()
            start = size * engine.mesh.data_parallel_rank
            # small parameters leave several of the last replicas nothing, and one a part
            stop = min(start + size, address.ds_numel)
            if start < stop:
                yield MasterPart(name, start, stop, owner, offset)
        elif address._hp_mapping is not None:
            low, high = (
                address._hp_mapping.lp_fragment_address,
                address._hp_mapping.hp_fragment_address,
            )
            yield MasterPart(name, low.start, low.start + low.numel, owner, high.start)


def state_keys(engine: TrainingEngine) -> tuple[list[str], int | None]:
    """Kinds of optimizer state with an entry for each element, and the steps that it counts.

    Returns:
        The kinds, sorted; None where this process has no state, or it counts none.

    Raises:
        ValueError: parts of the state count differently.
    """
    keys: set[str] = set()
    steps: set[int] = set()
    for _, _, owner in _owners(engine):
        for key, value in engine.optimizer.state.get(owner, {}).items():
            if key == STEP_KEY:
                steps.add(int(value))
            else:
                keys.add(key)
    if len(steps) > 1:
        raise ValueError(f"parts of the optimizer state count different steps: {sorted(steps)}")
    return sorted(keys), next(iter(steps), None)


def make_states(engine: TrainingEngine, keys: Iterable[str], step: int | None) -> None:
    """Gives the optimizer a state of zeros, in the place of what it has.

    Args:
        engine: the engine, fresh or not.
        keys: kinds of state with an entry for each element.
        step: what it counts as steps; None if it counts none.
    """
    for _, _, owner in _owners(engine):
        state = {key: torch.zeros_like(owner, requires_grad=False) for key in keys}
        if step is not None:
            state[STEP_KEY] = torch.tensor(float(step), device=owner.device)
        engine.optimizer.state[owner] = state


@torch.no_grad()
def follow_masters(engine: TrainingEngine) -> None:
    """Computes the parameters of the model from their fp32 masters; collective under ZeRO."""
    zero = engine.zero_optimizer
    if zero is None:
        return
    with doing("data parallel all-gather of parameters"):
        if engine.zero_stage < 3:
            zero.update_lp_params()
            _link_states(engine)
            return
        zero._partition_all_parameters()  # small ones are whole and would keep their old values
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)


def _own_shard(engine: TrainingEngine, name: str, whole: Tensor) -> Tensor:
    mesh, part = engine.mesh, engine.partition.specs[name]
    own = shard(whole, part.dimension, mesh.tensor_parallel_rank, mesh.tensor_parallel_size)
    return own.to(mesh.device)


def _collect(engine: TrainingEngine, part: ShardSpec, value: Tensor | None) -> Tensor | None:
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
            value = all_gather_shards(value, part.dimension, mesh)
    if mesh.data_parallel_rank or mesh.tensor_parallel_rank:
        return None
    value = bring_to_first_stage(value, part, mesh)
    return None if value is None else _on_host(value)


def _link_states(engine: TrainingEngine) -> None:
    """Points each parameter at its place in the optimizer state.

    DeepSpeed does so itself, but ZeRO 1 and 2 do it after the first parameter group was stepped,
    when the other groups have no state yet, and never again.
    """
    zero: Any = engine.zero_optimizer
    if engine.zero_stage in (1, 2):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _owners(engine: TrainingEngine) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each parameter with the tensor under which the optimizer keeps its state."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    zero = engine.zero_optimizer
    groups = engine.optimizer.param_groups
    if zero is None:
        for group in groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, parameter
        return
    if engine.zero_stage == 3:  # the torch groups are empty between steps
        # "fp16" is the name of whatever precision the model has
        members, owners = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    else:
        members = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
        # the flat partition has taken the place of the parameters in each group
        owners = [group["params"][0] for group in groups]
    for parameters, owner in zip(members, owners, strict=True):
        for parameter in parameters:
            yield names[id(parameter)], parameter, owner


def _get(engine: TrainingEngine, parameter: Any, key: str | None = None) -> Tensor:
    """Collects the fp32 master of a partitioned parameter, or an entry of its optimizer state."""
    zero: Any = engine.zero_optimizer
    with doing("data parallel gather of a master"):
        if engine.zero_stage == 3:
            return zero.get_full_hp_param(parameter, key)
        return parameter.get_full_hp_param(key)


def _set(engine: TrainingEngine, parameter: Any, value: Tensor, key: str | None = None) -> None:
    """Keeps this replica's part of what `_get` collects."""
    zero: Any = engine.zero_optimizer
    if engine.zero_stage < 3:
        parameter.set_full_hp_param(value, key)
        return
    size = parameter.partition_numel()  # the last replica's part is filled up
    start = size * engine.mesh.data_parallel_rank
    own = value.new_zeros(size)
    part = value.flatten()[start : start + size]
    own[: part.numel()] = part
    zero.set_local_hp_param(own, parameter, key)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; others are made anew by every process."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
