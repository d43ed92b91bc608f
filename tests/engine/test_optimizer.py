from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megadlcm.config import RunConfig
from megadlcm.config.training import OPTIMIZERS
from megadlcm.engine.optimizer import build_optimizer, parameter_groups
from megadlcm.engine.ratio_control import LINEAR_EPS
from megadlcm.model import build_model
from tests.support.tiny_runs import tiny_engine


@pytest.mark.parametrize("architecture", ["dlcm", "dense"])
def test_every_parameter_is_in_exactly_one_group(
    make_run: Callable[..., RunConfig], architecture: str
) -> None:
    config = make_run(model={"architecture": architecture})
    model = build_model(config.model, config.mup)
    grouped = [id(p) for group in parameter_groups(model, config) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(grouped) == len(set(grouped)) > 10


def test_groups_carry_the_rates_of_the_mup_table(make_run: Callable[..., RunConfig]) -> None:
    config = make_run(
        mup={"base_width": 8},
        optimizer={
            "learning_rate": 0.1,
            "token_learning_rate": 0.2,
            "concept_learning_rate": 0.4,
            "boundary_learning_rate": 0.8,
            "boundary_gain": 0.0,
            "eps": 1e-4,
        },
    )
    model = build_model(config.model, config.mup)
    groups = {group["mup_group"]: group for group in parameter_groups(model, config)}
    # widths 16 and 32 at base width 8: multipliers 2 and 4
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {
            "embedding": 0.1,
            "token": 0.2 / 2,
            "concept": 0.4 / 4,
            "boundary": 0.8 / 2,
            "gain": 0.1,
            "head": 0.1,
        }
    )
    assert groups["concept"]["eps"] == pytest.approx(1e-4 / 4)
    assert groups["token"]["weight_decay"] == config.optimizer.weight_decay > 0
    assert groups["gain"]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("options", "steered"),
    [
        ({}, True),
        ({"model": {"boundary_mode": "learned_local"}}, True),
        # here cross-entropy trains the detector too
        ({"model": {"boundary_mode": "ema_ste"}}, False),
        ({"optimizer": {"name": "sgd"}}, False),
        ({"optimizer": {"boundary_gain": 0.0}}, False),
    ],
)
def test_the_detector_takes_plain_gradient_steps_where_the_ratio_loss_alone_trains_it(
    make_run: Callable[..., RunConfig], options: dict[str, dict[str, object]], steered: bool
) -> None:
    config = make_run(**options)
    groups = parameter_groups(build_model(config.model, config.mup), config)
    assert [g["mup_group"] for g in groups if g["steered"]] == ["boundary"] * steered
    for group in groups:
        if group["steered"]:  # no averages, and an eps that no gradient reaches
            assert group["betas"] == (0.0, 0.0) and group["eps"] == LINEAR_EPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_as_many_moments_as_its_row_says(
    make_run: Callable[..., RunConfig], name: str
) -> None:
    """Plans of memory read the row."""
    config = make_run(optimizer={"name": name})
    model = build_model(config.model, config.mup)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state.get(parameter, {}).values()
        moments = [value for value in state if value is not None and value.shape == parameter.shape]
        assert len(moments) == OPTIMIZERS[config.optimizer.name].num_moments


def test_a_parameter_that_the_table_does_not_know_is_an_error(
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run()
    model = build_model(config.model, config.mup)
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="stray"):
        build_optimizer(model, config)


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
)
def test_rates_eps_and_decay_survive_deepspeed(
    make_run: Callable[..., RunConfig], precision: str, zero_stage: int
) -> None:
    config = make_run(
        parallel={"zero_stage": zero_stage},
        training={"precision": precision},
        mup={"base_width": 8},
    )
    keys = ("mup_group", "lr", "eps", "weight_decay")
    model = build_model(config.model, config.mup)
    expected = [[group[key] for key in keys] for group in parameter_groups(model, config)]
    engine = tiny_engine(config)
    survived = [[group[key] for key in keys] for group in engine.optimizer.param_groups]
    assert survived == expected
    assert len({tuple(entry[1:]) for entry in expected}) > 2
