from __future__ import annotations

import pytest
import torch

from megadlcm.config import ScheduleConfig
from megadlcm.engine.learning_rate import apply_learning_rates, learning_rate_factor, learning_rates


def factors(train_steps: int, **keys: float) -> list[float]:
    schedule = ScheduleConfig(**keys)
    return [learning_rate_factor(schedule, step, train_steps) for step in range(train_steps)]


def test_warmup_rises_in_equal_parts_and_reaches_the_peak_at_its_last_step() -> None:
    assert factors(10, warmup_steps=4, decay_fraction=0.0) == [0.25, 0.5, 0.75] + [1.0] * 7


def test_decay_falls_in_equal_parts_and_no_step_has_a_rate_of_zero() -> None:
    expected = [1.0] * 6 + [1.0, 0.75, 0.5, 0.25]
    assert factors(10, warmup_steps=0, decay_fraction=0.4) == pytest.approx(expected)


def test_decay_heads_for_the_final_ratio() -> None:
    decayed = factors(5, decay_fraction=0.8, final_ratio=0.2)
    assert decayed == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4])


def test_where_warmup_and_decay_overlap_the_smaller_one_holds() -> None:
    together = factors(4, warmup_steps=4, decay_fraction=1.0)
    assert together == pytest.approx([0.25, 0.5, 0.5, 0.25])


def test_a_step_depends_on_nothing_but_its_number() -> None:
    schedule = ScheduleConfig(warmup_steps=3, decay_fraction=0.5)
    in_order = factors(10, warmup_steps=3, decay_fraction=0.5)
    assert learning_rate_factor(schedule, 7, 10) == in_order[7] < 1.0


def test_every_group_moves_from_its_own_peak() -> None:
    groups = [
        {
            "params": [torch.nn.Parameter(torch.zeros(1))],
            "mup_group": name,
            "steered": name == "boundary",
            "eps": 10.0,
            "peak_learning_rate": peak,
        }
        for name, peak in (("token", 2.0), ("concept", 6.0), ("boundary", 1.0))
    ]
    optimizer = torch.optim.SGD(groups, lr=99.0)
    optimizer.param_groups[2]["lr"] = 7.0
    for _ in range(2):  # twice: the rate is set, not multiplied again
        apply_learning_rates(optimizer, 0.5)
    # a steered group has the rate that its controller gave it and follows no schedule
    assert optimizer.param_groups[2]["lr"] == 7.0
    # and what the trick with AdamW makes of it is no learning rate
    assert learning_rates(optimizer) == {"token": 1.0, "concept": 3.0}
