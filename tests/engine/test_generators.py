"""A training step draws nothing from the generators that libraries share: none has to be saved."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from megadlcm.checkpoint.resume import fresh_state
from megadlcm.config import RunConfig
from tests.support.layouts import run_steps
from tests.support.tiny_runs import tiny_engine


def states() -> tuple[object, ...]:
    """Of torch, numpy and Python."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, list(keys), *rest)


@pytest.mark.parametrize("boundary_mode", ["learned_global", "learned_local", "ema_ste", "rule"])
def test_no_generator_changes_its_state_in_a_step(
    boundary_mode: str, make_run: Callable[..., RunConfig]
) -> None:
    config = make_run(model={"boundary_mode": boundary_mode})
    engine, state = tiny_engine(config), fresh_state(config)
    before = states()
    run_steps(engine, config, state, 2)
    assert states() == before
    # each of them would be seen
    for draw in (torch.rand, np.random.random, lambda _: random.random()):
        draw(1)
        assert states() != before
        before = states()
