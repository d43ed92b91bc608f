"""Master parameters and optimizer state by parameter name, whatever DeepSpeed did to them.

Under ZeRO the optimizer sees one flat fp32 partition for each parameter group. DeepSpeed hangs on
every parameter the means to read and write its own place in that partition (`get_full_hp_param`,
`set_full_hp_param`); through them a checkpoint holds whole tensors under their names, which any
layout can read. Reading and writing are collective: every replica must call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

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
        whole = _full(engine, parameter)
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
                _partitioned(parameter).set_full_hp_param(value)
        if engine.zero_optimizer is not None:
            engine.zero_optimizer.update_lp_params()
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
                whole = _partitioned(parameter).get_full_hp_param(key)
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
                _partitioned(parameter).set_full_hp_param(value, key)


def _link_states(engine: TrainingEngine) -> None:
    """Points each parameter at its place in the optimizer state.

    DeepSpeed does so itself, but ZeRO 1 and 2 do it after the first parameter group was stepped,
    when the other groups have no state yet, and never again.
    """
    if engine.zero_optimizer is not None:
        engine.zero_optimizer._hp_optimizer_states_linked = False
        engine.zero_optimizer._lazy_init_hp_params_optimizer_state()


def _owners(engine: TrainingEngine) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each parameter with the tensor under which the optimizer keeps its state."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    zero = engine.zero_optimizer
    for index, group in enumerate(engine.optimizer.param_groups):
        if zero is None:
            members = group["params"]
        elif hasattr(zero, "bf16_groups"):
            members = zero.bf16_groups[index]
        else:
            members = zero.bit16_groups[index]
        for parameter in members:
            owner = parameter if zero is None else group["params"][0]
            yield names[id(parameter)], parameter, owner


def _full(engine: TrainingEngine, parameter: nn.Parameter) -> Tensor:
    if engine.zero_optimizer is None:
        return parameter.detach()
    return cast(Tensor, _partitioned(parameter).get_full_hp_param())


def _partitioned(parameter: nn.Parameter) -> Any:
    """The parameter with the methods that DeepSpeed adds to it, which no type knows."""
    return parameter


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
