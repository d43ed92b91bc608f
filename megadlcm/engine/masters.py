"""Master parameters and optimizer state by parameter name, whatever DeepSpeed did to them.

Under ZeRO the optimizer sees flat fp32 partitions of parameter groups, which a process has a range
of. What is here says which range of which parameter that is, and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadlcm.engine.engine import TrainingEngine
from megadlcm.parallel.watch.activity import doing

STEP_KEY = "step"


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
    for name, parameter, owner in owners_of(engine):
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
    for _, _, owner in owners_of(engine):
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
    for _, _, owner in owners_of(engine):
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
            link_states(engine)
            return
        zero._partition_all_parameters()  # small ones are whole and would keep their old values
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)


def link_states(engine: TrainingEngine) -> None:
    """Points each parameter at its place in the optimizer state.

    DeepSpeed does so itself, but ZeRO 1 and 2 do it after the first parameter group was stepped,
    when the other groups have no state yet, and never again.
    """
    zero: Any = engine.zero_optimizer
    if engine.zero_stage in (1, 2):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def owners_of(engine: TrainingEngine) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
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


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds; others are made anew by every process."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
