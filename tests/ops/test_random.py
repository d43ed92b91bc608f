"""Counter-based draws (peers' list 7)."""

from __future__ import annotations

import math

import pytest
import torch

from megadlcm.ops.random import uniform


def splitmix64(value: int) -> int:
    """The finaliser of SplitMix64 with Python's integers."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1, -3])
@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_draws_equal_the_definition_in_exact_integers(seed: int, step: int) -> None:
    """Wrap-around of int64 is the arithmetic modulo 2^64."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    index_T = torch.tensor([0, 1, 2, 4095, 2**40, 2**62 + 7])
    key = splitmix64((splitmix64(seed & mask) + step * golden) & mask)
    expected = [(splitmix64(index * golden + key) >> 40) * 2.0**-24 for index in index_T.tolist()]
    assert uniform(seed, step, index_T).tolist() == expected


def test_draws_are_uniform_and_uncorrelated() -> None:
    """Moments, bins and neighbours over a million draws; neighbouring steps too."""
    index_T = torch.arange(1_000_000)
    draw_T = uniform(0, 0, index_T).double()
    assert draw_T.min() >= 0
    assert draw_T.max() < 1
    assert abs(float(draw_T.mean()) - 0.5) < 2e-3
    assert abs(float(draw_T.var()) - 1 / 12) < 1e-3
    counts = torch.bincount((draw_T * 64).long(), minlength=64).double()
    chi_squared = float(((counts - 15625) ** 2 / 15625).sum())
    assert abs(chi_squared - 63) < 6 * math.sqrt(2 * 63)
    other_T = uniform(0, 1, index_T).double()
    for shifted in (draw_T.roll(1), other_T, other_T.roll(1), uniform(1, 0, index_T).double()):
        correlation = torch.corrcoef(torch.stack((draw_T, shifted)))[0, 1]
        assert abs(float(correlation)) < 5e-3


def test_a_draw_depends_on_its_own_index_alone() -> None:
    """Peers' list 7: any order, any company."""
    index_T = torch.arange(100)
    draw_T = uniform(3, 4, index_T)
    assert torch.equal(uniform(3, 4, index_T.flip(0)), draw_T.flip(0))
    assert torch.equal(uniform(3, 4, index_T[37:38]), draw_T[37:38])
    state = torch.get_rng_state()
    uniform(3, 4, index_T)
    assert torch.equal(torch.get_rng_state(), state)
