"""Master parameters and optimizer state by parameter name, whatever DeepSpeed did to them.

Under ZeRO the optimizer sees flat fp32 partitions of parameter groups. DeepSpeed knows the place of
each parameter in them: stages 1 and 2 hang the means to read and write it on the parameter itself
(`get_full_hp_param`, `set_full_hp_param`), stage 3 on its optimizer. Through them a checkpoint
holds whole tensors under their names, which any layout can read. Reading and writing are
collective: every replica must call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megadlcm.training.engine import TrainingEngine

STEP_KEY = "step"


def read_model(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies parameters (fp32 masters) and buffers to the host.

    Args:
        engine: the engine.

    Returns:
        Tensors by name; empty on replicas that do not write.
    """
    tensors = {}
    for name, parameter in engine.model.named_parameters():
        whole = parameter if engine.zero_optimizer is None else _get(engine, parameter)
        if engine.mesh.is_writer:
            tensors[name] = _on_host(whole)
    if engine.mesh.is_writer:
        tensors.update({name: _on_host(buffer) for name, buffer in _saved_buffers(engine.model)})
    return tensors


def write_model(engine: TrainingEngine, tensors: dict[str, Tensor]) -> None:
    """Sets parameters, fp32 masters and buffers; the inverse of `read_model`.

    Args:
        engine: the engine.
        tensors: tensors by name, complete.
    """
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            value = tensors[name].to(engine.mesh.device)
            if engine.zero_optimizer is None:
                parameter.copy_(value)
            else:
                _set(engine, parameter, value)
        _follow_masters(engine)
        for name, buffer in _saved_buffers(engine.model):
            buffer.copy_(tensors[name])


def read_optimizer(engine: TrainingEngine) -> dict[str, Tensor]:
    """Copies the optimizer state to the host, as `<parameter>.<key>`.

    Args:
        engine: the engine.

    Returns:
        Tensors by name; empty on replicas that do not write, and for an optimizer without state.
    """
    _link_states(engine)
    tensors = {}
    for name, parameter, owner in _owners(engine):
        state = engine.optimizer.state.get(owner, {})
        for key in sorted(state):
            if key == STEP_KEY or engine.zero_optimizer is None:
                whole = state[key]
            else:
                whole = _get(engine, parameter, key)
            if engine.mesh.is_writer:
                tensors[f"{name}.{key}"] = _on_host(whole)
    return tensors


def write_optimizer(engine: TrainingEngine, tensors: dict[str, Tensor]) -> None:
    """Sets the optimizer state; the inverse of `read_optimizer`.

    Args:
        engine: the engine, fresh or not.
        tensors: tensors named `<parameter>.<key>`, complete.
    """
    keys = sorted({name.rsplit(".", 1)[1] for name in tensors})
    if not keys:
        return
    owners = list(_owners(engine))
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
                continue
            value = tensors[f"{name}.{key}"].to(engine.mesh.device)
            if engine.zero_optimizer is None:
                engine.optimizer.state[owner][key].copy_(value)
            else:
                _set(engine, parameter, value, key)


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
        members, owners = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    else:
        members = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
        owners = [group["params"][0] for group in groups]
    for parameters, owner in zip(members, owners, strict=True):
        for parameter in parameters:
            yield names[id(parameter)], parameter, owner


def _get(engine: TrainingEngine, parameter: Any, key: str | None = None) -> Tensor:
    """Collects the fp32 master of a partitioned parameter, or an entry of its optimizer state."""
    zero: Any = engine.zero_optimizer
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


def _follow_masters(engine: TrainingEngine) -> None:
    """Computes the parameters of the model from their fp32 masters."""
    zero = engine.zero_optimizer
    if zero is None:
        return
    if engine.zero_stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # small ones are kept whole and would keep their old values
    for sub_group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(sub_group)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
