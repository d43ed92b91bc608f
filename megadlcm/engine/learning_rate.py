"""Warmup-stable-decay as a pure function of the step."""

from __future__ import annotations

from torch.optim import Optimizer

from megadlcm.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, train_steps: int) -> float:
    """Share of the peak learning rate at a step.

    With n = step + 1, W = warmup_steps and D = decay_fraction * train_steps rounded:
    n / W up to step W, then 1, then 1 - (1 - final_ratio) * (step - (train_steps - D)) / D.
    The ratio is reached *after* the last step: with final_ratio = 0 no step has a rate of zero.
    Where warmup and decay overlap the smaller of the two holds.

    Args:
        schedule: warmup, decay and final ratio.
        step: steps completed before this one, 0 <= step < train_steps.
        train_steps: steps of the whole run.

    Returns:
        Factor in [0, 1].
    """
    # of the step that begins, so that the first one moves
    warmup = (step + 1) / schedule.warmup_steps if schedule.warmup_steps else 1.0
    decay_steps = round(schedule.decay_fraction * train_steps)
    into_decay = step - (train_steps - decay_steps)
    # also where `decay_fraction` rounds to no step at all
    decay = 1.0
    if decay_steps and into_decay > 0:
        decay = 1.0 - (1.0 - schedule.final_ratio) * min(into_decay / decay_steps, 1.0)
    # the smaller one and not the product, which would dip where they overlap
    return min(1.0, warmup, decay)


def apply_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Sets the learning rate of every parameter group to its own peak times the factor.

    A steered group keeps what `ratio_control` gave it: its rate is the gain of a controller, which
    is needed most while everything else warms up.
    """
    for group in optimizer.param_groups:
        if not group["steered"]:
            group["lr"] = group["peak_learning_rate"] * factor


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Current learning rate of each muP group; a steered group has a step size instead of one."""
    return {
        group["mup_group"]: group["lr"] for group in optimizer.param_groups if not group["steered"]
    }
