"""Decoupled muP (DLCM Eq. 18-21): one table that says how each parameter starts and learns.

Two widths, two multipliers: s_token = d_token / base_width, s_concept = d_concept / base_width.
A matrix follows the multiplier of its fan-in: variance, learning rate and AdamW epsilon fall as
1/s, while embeddings, gains and the head keep their base values (the head's logits are divided
by s_token instead). Matrices that bridge the two widths follow the side they read from.

Embeddings have a standard deviation of their own, 1 unless told otherwise. With small ones the
residual stream of a fresh encoder is mostly what all tokens have in common, neighbours look alike,
and the boundary scores travel far while that changes; the ratio then swings for the whole run.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadlcm.config import ModelConfig, MupConfig

GROUPS = ("embedding", "token", "concept", "boundary", "gain", "head")

# (parameter name, group); the first match decides and a parameter without a match is an error
_GROUP_TABLE = (
    (r"token_embedding\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
    (r"boundary_detector\.w_[qk]\.weight", "boundary"),
    (r".*norm\.gain", "gain"),
    (r"concept_pool\.null_concept", "gain"),
    (r"concept_pool\.up_projection\.weight", "token"),
    (r"concept_reader\.w[qo]\.weight", "token"),
    (r"concept_reader\.w[kv]\.weight", "concept"),
    (r"(encoder|decoder)\.blocks\.\d+\.attention\.w[qkvo]\.weight", "token"),
    (r"(encoder|decoder)\.blocks\.\d+\.feed_forward\.w_(gate|up|down)\.weight", "token"),
    (r"backbone\.blocks\.\d+\.attention\.w[qkvo]\.weight", "concept"),
    (r"backbone\.blocks\.\d+\.feed_forward\.w_(gate|up|down)\.weight", "concept"),
)
# the head is not: its logits are divided instead, so that it keeps the base rate
_WIDTH_SCALED = ("token", "concept", "boundary")
# not the detector: a cosine does not see sizes, and the rate of plain steps times a decay, as
# AdamW decays, would erase its matrices
_DECAYING = ("token", "concept", "head")


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is initialised and optimised."""

    group: str
    """muP group, one of `GROUPS`."""
    init_std: float | None
    """Standard deviation of its initial values; None where they are not drawn at random."""
    learning_rate_scale: float
    """Factor on the base learning rate of the group."""
    eps_scale: float
    """Factor on the base AdamW epsilon."""
    decays: bool
    """Whether weight decay applies."""


def width_multiplier_token(config: ModelConfig, mup: MupConfig) -> float:
    """s_token = d_token / base_width."""
    return config.d_token / mup.base_width


def width_multiplier_concept(config: ModelConfig, mup: MupConfig) -> float:
    """s_concept = d_concept / base_width."""
    return config.d_concept / mup.base_width


def group_of(name: str) -> str:
    """Finds the muP group of a parameter.

    Args:
        name: dotted name of the parameter.

    Returns:
        One of `GROUPS`.

    Raises:
        ValueError: the table does not know the parameter.
    """
    for pattern, group in _GROUP_TABLE:
        # the whole name: a parameter that only begins like one of these needs a decision
        if re.fullmatch(pattern, name):
            return group
    raise ValueError(
        f"parameter {name} belongs to no muP group: add it to the table of model/scaling.py"
    )


def parameter_table(
    model: nn.Module, config: ModelConfig, mup: MupConfig
) -> dict[str, ParameterRule]:
    """Assigns every parameter of a model to exactly one group.

    Args:
        model: the model; only names are read, so it may live on the meta device.
        config: its shape.
        mup: base width and base standard deviation.

    Returns:
        Rule of each parameter, by name.

    Raises:
        ValueError: a parameter without a group.
    """
    return {name: _rule(name, config, mup) for name, _ in model.named_parameters()}


def _rule(name: str, config: ModelConfig, mup: MupConfig) -> ParameterRule:
    group = group_of(name)
    multiplier = (
        width_multiplier_concept(config, mup)
        if group == "concept"
        else width_multiplier_token(config, mup)
    )
    # eps falls with the gradient's size, or AdamW would stall in wide models
    scale = 1.0 / multiplier if group in _WIDTH_SCALED else 1.0
    return ParameterRule(
        group, _init_std(name, group, scale, config, mup), scale, scale, group in _DECAYING
    )


def _init_std(
    name: str, group: str, scale: float, config: ModelConfig, mup: MupConfig
) -> float | None:
    if group == "embedding":
        return mup.embedding_std
    # None: not drawn, `initial_value` knows what it is
    zero = config.cross_output_zero_init and name == "concept_reader.wo.weight"
    return None if group in ("gain", "boundary") or zero else mup.init_std * math.sqrt(scale)


@torch.no_grad()
def initialize_parameters(model: nn.Module, config: ModelConfig, mup: MupConfig, seed: int) -> None:
    """Draws the initial values of every parameter.

    Args:
        model: the whole model, on a real device.
        config: its shape.
        mup: base width and base standard deviation.
        seed: seed of the run.
    """
    rules = parameter_table(model, config, mup)
    for name, parameter in model.named_parameters():
        # drawn in fp32 on the CPU: generators of devices differ
        parameter.copy_(initial_value(name, parameter.shape, rules[name], seed))


def initial_value(name: str, shape: torch.Size, rule: ParameterRule, seed: int) -> Tensor:
    """Draws the initial value of one parameter.

    Each parameter has a generator of its own, seeded by (seed, name), so that its values do not
    depend on which other parameters exist or where they live.

    Args:
        name: dotted name of the parameter.
        shape: its whole shape.
        rule: how it starts.
        seed: seed of the run.

    Returns:
        fp32, of that shape, on the CPU.
    """
    if rule.init_std is not None:
        return torch.randn(shape, generator=_generator(seed, name)) * rule.init_std
    if rule.group == "boundary":
        return _orthonormal(shape, seed)
    # gains 1; null concept and an output that starts at zero 0
    return torch.full(shape, 1.0 if name.endswith("gain") else 0.0)


def _orthonormal(shape: torch.Size, seed: int) -> Tensor:
    """The identity, or for a rectangle the same orthonormal rows for W_q and W_k."""
    rows, columns = shape
    # the identity: training begins with the plain cosine of the states
    if rows == columns:
        return torch.eye(rows)
    # one name for both, so that W_q and W_k are the same matrix
    square = torch.randn(
        max(rows, columns), max(rows, columns), generator=_generator(seed, "boundary_detector")
    )
    return torch.linalg.qr(square).Q[:rows, :columns]


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # torch takes seeds below 2^63
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
