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
        groups.append(
            {
                "params": members[key],
                "mup_group": group,
                "peak_learning_rate": peak,
                "lr": peak,
                "eps": config.optimizer.eps * eps_scale,
                "betas": _betas(config.optimizer, group),
                "weight_decay": config.optimizer.weight_decay if decays else 0.0,
            }
        )
    return groups


def _betas(config: OptimizerConfig, group: str) -> tuple[float, float]:
    """AdamW's averages for a muP group.

    The boundary projections are trained by the ratio loss alone, which is an integral controller
    of the boundary rate. A running mean of its gradient is a lag in that loop and makes the rate
    swing for dozens of steps, so they have none. Dividing by the running square gives each step
    nearly full size however small the error, so the rate dances around the target by what one
    step moves: their learning rate is a tenth of the others' (at 3e-3 it alternates between half
    and twice the target; with a large epsilon instead it trails behind while the encoder moves).
    """
    return config.boundary_betas if group == "boundary" else config.betas


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
