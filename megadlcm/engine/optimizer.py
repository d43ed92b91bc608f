"""Parameter groups (muP group, weight decay) -> a torch optimizer.

An optimizer is a builder here and a row of `config.training.OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megadlcm.config import OptimizerConfig, RunConfig
from megadlcm.config.training import OptimizerName
from megadlcm.engine.ratio_control import LINEAR_EPS, steers_detector
from megadlcm.model.scaling import GROUPS, ParameterRule, parameter_table


def base_learning_rate(config: OptimizerConfig, group: str) -> float:
    """Learning rate of a muP group at the base width, before its width scale."""
    own = {
        "token": config.token_learning_rate,
        "concept": config.concept_learning_rate,
        "boundary": config.boundary_learning_rate,
    }.get(group)
    return config.learning_rate if own is None else own


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Puts every parameter in exactly one torch parameter group, one for each muP group.

    eta = eta_base * learning_rate_scale and eps = eps_base * eps_scale (decoupled muP, Eq. 18-21);
    weight decay applies to the groups that decay. AdamW multiplies decay by the learning rate.

    Args:
        model: the model.
        config: the run; the optimizer, mup and model sections are read.

    Returns:
        Groups in a fixed order, as torch optimizers take them, with keys of our own: `mup_group`
        (name), `is_sharded` (by tensor parallelism), `peak_learning_rate`, and `steered` where
        `ratio_control` sets the rate.
    """
    rules = parameter_table(model, config.model, config.mup)
    members: dict[tuple[str, float, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # ZeRO lays a group end to end: what is counted once and what on each process of a tensor
        # parallel group must not lie in one
        is_sharded = bool(getattr(parameter, "tensor_model_parallel", False))
        members.setdefault((*_group_key(rules[name]), is_sharded), []).append(parameter)
    groups = []
    # a fixed order: flat buffers and checkpoints follow it, on every process alike
    for key in sorted(members, key=lambda key: (GROUPS.index(key[0]), key[1:])):
        group, learning_rate_scale, eps_scale, decays, is_sharded = key
        peak = base_learning_rate(config.optimizer, group) * learning_rate_scale
        steered = group == "boundary" and steers_detector(config)
        groups.append(
            {
                "params": members[key],
                "mup_group": group,
                "is_sharded": is_sharded,
                "steered": steered,
                # a steered group stands still until its controller has spoken
                "peak_learning_rate": 0.0 if steered else peak,
                "lr": 0.0 if steered else peak,
                "eps": LINEAR_EPS if steered else config.optimizer.eps * eps_scale,
                "betas": (0.0, 0.0) if steered else config.optimizer.betas,
                "weight_decay": config.optimizer.weight_decay if decays else 0.0,
            }
        )
    return groups


def _group_key(rule: ParameterRule) -> tuple[str, float, float, bool]:
    return (rule.group, rule.learning_rate_scale, rule.eps_scale, rule.decays)


def build_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Builds the torch optimizer that DeepSpeed drives, for a model on its device."""
    build = _BUILDERS[config.optimizer.name]
    return build(parameter_groups(model, config), config.optimizer)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    # torch's fused kernel: one pass over memory, and as deterministic as the loop
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """For parity checks: Adam hides a gradient that is wrong by a factor."""
    for group in groups:  # torch would keep them in its checkpoints as settings of SGD
        del group["eps"], group["betas"]
    return torch.optim.SGD(groups, lr=config.learning_rate)


_BUILDERS: dict[OptimizerName, Callable[[list[dict[str, Any]], OptimizerConfig], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}
