"""Quotas are exact and every position is known without counting."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.quotas import MAX_PERIOD, rounded_shares, source_quotas
from data_pipeline.reading.mixture import SPREAD, Mixture
from tests.support.tiny_shards import one_line


def weighted(*weights: float) -> list[SourceConfig]:
    """Returns sources with these weights."""
    return [SourceConfig(f"source{number}", weight) for number, weight in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ((1.0,), (1,)),
        ((0.5, 0.25, 0.15, 0.1), (10, 5, 3, 2)),
        ((50, 25, 15, 10), (10, 5, 3, 2)),
        ((0.7, 0.3), (7, 3)),
        ((3, 3, 3), (1, 1, 1)),
        ((1e-3, 0.999), (1, 999)),
    ],
)
def test_decimal_weights_give_exact_quotas(
    weights: tuple[float, ...], quotas: tuple[int, ...]
) -> None:
    """0.1 means one tenth, not the binary number next to it."""
    assert source_quotas(weighted(*weights), "train") == quotas


def test_an_uneven_weight_is_rounded_by_less_than_one_sample_a_period() -> None:
    """Largest remainder over the longest period."""
    weights = (3.14159265, 2.71828183, 1.41421356)
    quotas = source_quotas(weighted(*weights), "train")
    assert sum(quotas) == MAX_PERIOD
    for weight, quota in zip(weights, quotas, strict=True):
        assert abs(quota - weight / sum(weights) * MAX_PERIOD) < 1


def test_weights_are_bounded_and_may_be_as_different_as_numbers_are() -> None:
    """Their sum must be a number, and the light one is named."""
    with pytest.raises(InputError, match=r"weight = 1e\+308, must be <= 1e\+18") as error:
        weighted(1e308, 1e308, 1e-300)
    one_line(error)
    for light in (1e-300, 5e-324):
        with pytest.raises(InputError, match=r"data\.train\[2\]\.weight"):
            source_quotas(weighted(1e18, 1e18, light), "train")


def test_a_share_that_rounding_moves_is_said() -> None:
    rounded = rounded_shares(weighted(1.0, 2e-4, 0.3000001))
    assert rounded == ["source1 0.024% instead of 0.015%"]
    for exact in ((0.5, 0.25, 0.15, 0.1), (1 / 3, 2 / 3), (3.14159265, 2.71828183)):
        assert rounded_shares(weighted(*exact)) == []


def test_a_source_too_light_for_any_sample_is_refused() -> None:
    """It would never be read, which nobody asked for."""
    with pytest.raises(InputError, match=r"data\.train\[1\]\.weight = 1e-09") as error:
        source_quotas(weighted(1.0, 1e-9), "train")
    one_line(error)


@given(
    quotas=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    period=st.sampled_from([0, 1, 7, 10**12]),
)
def test_each_period_holds_each_quota_and_numbers_run_on(
    quotas: list[int], seed: int, period: int
) -> None:
    """Also far out, where nobody has counted the samples before."""
    mixture = Mixture(quotas, seed)
    first = period * mixture.period
    turns = [mixture.turn(first + offset) for offset in range(mixture.period)]
    assert Counter(turn.source for turn in turns) == dict(enumerate(quotas))
    for source, quota in enumerate(quotas):
        numbers = [turn.number for turn in turns if turn.source == source]
        assert numbers == list(range(period * quota, (period + 1) * quota))


def test_numbers_are_the_count_of_earlier_turns() -> None:
    """The closed form against the definition, asked in any order."""
    mixture = Mixture((3, 1, 2), seed=4)
    counts: Counter[int] = Counter()
    turns = []
    for sample in range(60):
        turn = mixture.turn(sample)
        assert turn.number == counts[turn.source]
        counts[turn.source] += 1
        turns.append(turn)
    assert [mixture.turn(sample) for sample in reversed(range(60))] == turns[::-1]


def test_the_order_inside_a_period_changes_from_period_to_period() -> None:
    """And with the seed."""
    mixture, other = Mixture((5, 5), 0), Mixture((5, 5), 1)
    periods = [
        tuple(mixture.turn(period * 10 + offset).source for offset in range(10))
        for period in range(5)
    ]
    assert len(set(periods)) > 1
    assert periods[0] != tuple(other.turn(offset).source for offset in range(10))


@given(quotas=st.lists(st.integers(1, 400), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_any_stretch_of_samples_is_near_its_shares(quotas: list[int], seed: int) -> None:
    """Not only whole periods: a source is never more than a few samples ahead or behind."""
    mixture = Mixture(quotas, seed)
    sources = np.array([mixture.turn(sample).source for sample in range(2 * mixture.period)])
    for source, quota in enumerate(quotas):
        given_so_far = np.concatenate(([0], np.cumsum(sources == source)))
        lead = given_so_far - np.arange(len(sources) + 1) * quota / mixture.period
        # len(quotas) from the even spacing, SPREAD / 4 + what a shuffle of SPREAD places can do
        assert np.abs(lead).max() <= len(quotas) + SPREAD / 4
        assert lead[mixture.period] == 0


def test_a_period_shuffled_as_a_whole_strays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the bound above."""
    monkeypatch.setattr("data_pipeline.reading.mixture.SPREAD", MAX_PERIOD)
    mixture = Mixture((2000, 2000), 0)
    sources = np.array([mixture.turn(sample).source for sample in range(4000)])
    lead = np.cumsum(sources == 0) - np.arange(1, 4001) / 2
    assert np.abs(lead).max() > 2 + SPREAD / 4


@pytest.mark.parametrize("quotas", [(3, 1, 2), (100, 57), (5,)])
def test_counts_are_those_of_counting(quotas: tuple[int, ...]) -> None:
    """At every number of samples over two periods."""
    mixture = Mixture(quotas, seed=1)
    counted = [0] * len(quotas)
    for sample in range(2 * mixture.period + 1):
        assert mixture.counts(sample) == counted
        counted[mixture.turn(sample).source] += 1


def test_weights_sum_to_the_shares_they_promise() -> None:
    """Over whole periods the share of each source is its weight exactly."""
    weights = (0.45, 0.35, 0.2)
    mixture = Mixture(source_quotas(weighted(*weights), "train"), 0)
    counts = Counter(mixture.turn(sample).source for sample in range(3 * mixture.period))
    for source, weight in enumerate(weights):
        assert Fraction(counts[source], 3 * mixture.period) == Fraction(str(weight))
