"""Parameter groups (muP group, weight decay) -> AdamW or SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megadlcm.config import OptimizerConfig, RunConfig
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
        Groups in a fixed order, as torch optimizers take them, with two keys of our own:
        `mup_group` (name) and `peak_learning_rate`.
    """
    rules = parameter_table(model, config.model, config.mup)
    members: dict[tuple[str, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(_group_key(rules[name]), []).append(parameter)
    groups = []
    for key in sorted(members, key=lambda key: (GROUPS.index(key[0]), key[1:])):
        group, learning_rate_scale, eps_scale, decays = key
        peak = base_learning_rate(config.optimizer, group) * learning_rate_scale
        betas, eps = _adam_constants(config.optimizer, group)
        groups.append(
            {
                "params": members[key],
                "mup_group": group,
                "peak_learning_rate": peak,
                "lr": peak,
                "eps": eps * eps_scale,
                "betas": betas,
                "weight_decay": config.optimizer.weight_decay if decays else 0.0,
            }
        )
    return groups


def _adam_constants(config: OptimizerConfig, group: str) -> tuple[tuple[float, float], float]:
    """AdamW's averages and base epsilon for a muP group.

    The boundary projections are trained by the ratio loss alone, which is an integral controller
    of the boundary rate, and AdamW's usual constants make a bad one. The running mean of the
    gradient is a lag: the rate swings for dozens of steps. Dividing by the running square keeps
    steps at full size however small the error: the rate alternates around the target, at 3e-3
    between half and twice of it. Without the mean, and with an epsilon as large as the gradient
    at a third of error, the step is proportional to the error and the rate settles.
    """
    if group == "boundary":
        return config.boundary_betas, config.boundary_eps
    return config.betas, config.eps


def _group_key(rule: ParameterRule) -> tuple[str, float, float, bool]:
    return (rule.group, rule.learning_rate_scale, rule.eps_scale, rule.decays)


def build_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Builds the torch optimizer that DeepSpeed drives.

    AdamW runs in torch's fused kernel: one pass over memory, and as deterministic as the loop.
    SGD exists for parity checks, because Adam hides a gradient that is wrong by a factor.

    Args:
        model: the model, on its device.
        config: the run.

    Returns:
        torch.optim.AdamW or torch.optim.SGD.
    """
    groups = parameter_groups(model, config)
    if config.optimizer.name == "sgd":
        for group in groups:
            del group["eps"], group["betas"]
        return torch.optim.SGD(groups, lr=config.optimizer.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        fused=True,
    )
