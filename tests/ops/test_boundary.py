"""Boundary scores and decisions (peers' list 7, 11, 16, 17, 34, 35, 36)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadlcm.ops.boundary import (
    NUM_PROBABILITY_BINS,
    BoundarySampling,
    boundary_probability,
    draw_balance,
    fixed_boundaries,
    histogram_quantile,
    histogram_share,
    limit_segments,
    neighbour_cosine,
    probability_histogram,
    sample_boundaries,
    sharpen,
    threshold_boundaries,
)
from megadlcm.ops.packing import packing_from_offsets


def one_document(length: int) -> Tensor:
    """Places of the tokens of one document."""
    return torch.arange(length)


def probability_of(states_TD: Tensor) -> Tensor:
    """p of a document with identity projections."""
    return boundary_probability(
        neighbour_cosine(states_TD, states_TD), one_document(len(states_TD))
    )


def test_the_score_is_the_formula_of_the_paper() -> None:
    """Eq. 6, row by row: p_t = (1 - cos(q_(t-1), k_t)) / 2 and p = 1 at document starts."""
    generator = torch.Generator().manual_seed(0)
    query_TD, key_TD = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    packing = packing_from_offsets(torch.tensor([0, 4, 5, 9]), 9)
    prob_T = boundary_probability(neighbour_cosine(query_TD, key_TD), packing.position)
    for token in range(9):
        expected = 1.0
        if token not in (0, 4, 5):
            pair = (query_TD[token - 1], key_TD[token])
            expected = float(1 - torch.cosine_similarity(*pair, dim=0)) / 2
        assert math.isclose(float(prob_T[token]), expected, abs_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_identical_and_opposite_neighbours_reach_the_ends_of_the_range(dtype: torch.dtype) -> None:
    """Peers' list 17: p stays in [0, 1] and the decision is the expected one."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(300, 1, 33, generator=generator).to(dtype)
    for token in state:
        prob_T = probability_of(torch.cat((token, token, -token)))
        assert bool(((prob_T >= 0) & (prob_T <= 1)).all())
        assert abs(float(prob_T[1])) < 1e-6
        assert abs(float(prob_T[2]) - 1) < 1e-6
        assert threshold_boundaries(prob_T, one_document(3)).tolist() == [True, False, True]


def test_a_tie_is_a_boundary_whoever_decides() -> None:
    """Peers' list 17: p = 0.5 exactly; zero vectors give that and count as a boundary."""
    position_T = one_document(4)
    tie_T = torch.tensor([1.0, 0.5, 0.5 - 2**-25, 0.5])
    assert threshold_boundaries(tie_T, position_T).tolist() == [True, True, False, True]
    assert sharpen(tie_T, 1e9)[1] > 0.99, "training draws the same way"
    assert sharpen(tie_T, 1e9)[2] < 0.01
    zero_TD = torch.zeros(4, 3)
    assert probability_of(zero_TD).tolist() == [1.0, 0.5, 0.5, 0.5]
    half_zero_TD = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert probability_of(half_zero_TD).tolist() == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_finite_where_neighbours_are_parallel_or_zero(dtype: torch.dtype) -> None:
    """Peers' list 17: cos = +1, cos = -1, zero vectors, tiny and huge vectors."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(1, 7, generator=generator, dtype=dtype)
    zero = torch.zeros_like(base)
    states_TD = torch.cat(
        (base, base, -base, 3 * base, zero, zero, base, base * 1e-15, base * 1e15, base)
    ).requires_grad_()
    prob_T = probability_of(states_TD)
    weight_T = torch.randn(len(states_TD), generator=generator, dtype=dtype)
    (gradient,) = torch.autograd.grad((prob_T * weight_T).sum(), states_TD)
    assert bool(prob_T.isfinite().all())
    assert bool(gradient.isfinite().all())
    # parallel neighbours are at an extremum of the cosine: the projection leaves rounding noise
    noise = 1e-5 if dtype == torch.float32 else 1e-14
    assert gradient[1].abs().max() < noise


def test_the_score_can_be_differentiated() -> None:
    """Gradcheck away from the clamp, with and without the offset."""
    generator = torch.Generator().manual_seed(3)
    states_TD = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    packing = packing_from_offsets(torch.tensor([0, 2, 6]), 6)
    for offset in (0.0, 0.1):
        assert torch.autograd.gradcheck(
            lambda states, offset=offset: boundary_probability(
                neighbour_cosine(states, states), packing.position, offset
            ),
            states_TD,
        )


def test_sharpening_follows_its_formula_and_flips_as_often_as_stated() -> None:
    """Peers' list 35: table of the design; the share of flipped decisions is the formula's."""
    prob = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.49, 0.51, 0.6, 0.8], dtype=torch.float64)
    expected = torch.tensor([0.017, 0.037, 0.058, 0.082, 0.106, 0.894, 0.918, 0.963])
    torch.testing.assert_close(sharpen(prob, 6.0).float(), expected, rtol=0, atol=5e-4)
    torch.testing.assert_close(sharpen(prob, 1.0), prob)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(sharpen(ends, 6.0), ends)
    num_draws = 400_000
    position_T = one_document(num_draws)
    for probability in (0.05, 0.2, 0.4, 0.5, 0.6, 0.95):
        prob_T = torch.full((num_draws,), probability)
        drawn_T = sample_boundaries(
            prob_T, 6.0, BoundarySampling(0, 3, torch.arange(num_draws)), position_T
        )
        sharp = float(sharpen(torch.tensor(probability).double(), 6.0))
        flipped = float((drawn_T != threshold_boundaries(prob_T, position_T)).double().mean())
        rate = min(sharp, 1 - sharp)
        assert abs(flipped - rate) < 5 * math.sqrt(rate / num_draws) + 1e-5


def test_decisions_at_uniform_probabilities_flip_one_time_in_twenty() -> None:
    """Peers' list 35: 4.9 % for uniform p at a sharpening of 6."""
    num_draws = 400_000
    position_T = one_document(num_draws)
    prob_T = torch.rand(num_draws, generator=torch.Generator().manual_seed(4))
    drawn_T = sample_boundaries(
        prob_T, 6.0, BoundarySampling(0, 0, torch.arange(num_draws)), position_T
    )
    flipped = float((drawn_T != threshold_boundaries(prob_T, position_T)).double().mean())
    uniform_p = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    sharp = sharpen(uniform_p, 6.0)
    rate = float(torch.minimum(sharp, 1 - sharp).mean())
    assert abs(rate - 0.049) < 1e-3
    assert abs(flipped - rate) < 2e-3


def test_draws_follow_the_token_index_and_carry_no_gradient() -> None:
    """Peers' list 7: the same tokens in another place of the pack are drawn alike."""
    prob_T = torch.full((50,), 0.4, requires_grad=True)
    index_T = torch.arange(1000, 1050)
    whole = sample_boundaries(prob_T, 1.0, BoundarySampling(1, 2, index_T), one_document(50))
    part = sample_boundaries(
        prob_T[20:], 1.0, BoundarySampling(1, 2, index_T[20:]), one_document(30)
    )
    assert torch.equal(part[1:], whole[21:])
    assert not whole.requires_grad


def test_every_document_starts_with_a_boundary_even_at_probability_zero() -> None:
    """Peers' list 11."""
    packing = packing_from_offsets(torch.tensor([0, 1, 4, 6]), 6)
    prob_T = torch.zeros(6)
    starts = [True, True, False, False, True, False]
    sampling = BoundarySampling(0, 0, torch.arange(6))
    assert sample_boundaries(prob_T, 6.0, sampling, packing.position).tolist() == starts
    assert threshold_boundaries(prob_T, packing.position).tolist() == starts
    assert threshold_boundaries(prob_T, packing.position, threshold=2.0).tolist() == starts


@pytest.mark.parametrize("ratio", [1.0, 2.0, 2.5, 3.7, 4.0, 1e6])
def test_fixed_boundaries_come_every_r_tokens_of_each_document(ratio: float) -> None:
    """Peers' list 35: R = 1 is every token, a huge R only the first; no division by zero."""
    packing = packing_from_offsets(torch.tensor([0, 100, 101, 141]), 141)
    mask_T = fixed_boundaries(packing.position, ratio)
    for start, stop in ((0, 100), (100, 101), (101, 141)):
        inside = mask_T[start:stop]
        assert bool(inside[0])
        # positions 0..n-1 hold floor((n-1) / R) + 1 multiples of R
        assert int(inside.sum()) == math.floor((stop - start - 1) / ratio) + 1
    if ratio == 4.0:
        assert mask_T[101:].nonzero().flatten().tolist() == list(range(0, 40, 4))


@pytest.mark.parametrize("ratio", [1.1, 2.2, 3.7, 2.5])
def test_fixed_boundaries_alone_and_together_are_the_same(ratio: float) -> None:
    """Decoding asks for one position at a time; a quotient near an integer must fall alike."""
    position = torch.arange(20_000)
    together = fixed_boundaries(position, ratio)
    assert together.tolist() == [bool(fixed_boundaries(one, ratio)) for one in position]
    integer = (position.double() / ratio).frac() == 0
    assert integer.any(), "some quotient is an integer, or rounded to one"
    floor_division = torch.tensor([int(one) // ratio for one in position])
    other = floor_division > torch.tensor([(int(one) - 1) // ratio for one in position])
    assert torch.equal(other, together) == (ratio == 2.5), "the control must show the difference"


@pytest.mark.parametrize("limit", [2, 3, 5])
@settings(deadline=None, max_examples=100, derandomize=True)
@given(documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4))
def test_forced_boundaries_keep_segments_short_and_stay_causal(
    limit: int, documents: list[list[bool]]
) -> None:
    """Peers' list 16: the bound holds, no decision is lost, and a prefix is decided alike."""
    offsets = torch.tensor([0, *map(len, documents)]).cumsum(0)
    packing = packing_from_offsets(offsets, int(offsets[-1]))
    mask_T = torch.tensor([decision for document in documents for decision in document])
    mask_T |= packing.position == 0
    limited_T = limit_segments(mask_T, limit)
    assert bool((limited_T | ~mask_T).all())
    for start, stop in zip(packing.bounds, packing.bounds[1:], strict=False):
        places = limited_T[start:stop].nonzero().flatten()
        gaps = torch.cat((places, torch.tensor([stop - start]))).diff()
        assert int(gaps.max()) <= limit
        since = 0
        for token in range(start, stop):
            since = 0 if mask_T[token] or since + 1 == limit else since + 1
            assert bool(limited_T[token]) == (since == 0)
    for stop in range(1, packing.bounds[1] + 1):
        prefix = limit_segments(mask_T[:stop], limit)
        assert torch.equal(prefix, limited_T[:stop])


def test_bf16_states_are_compared_in_fp32() -> None:
    """Peers' list 36: against fp64 given the same states; doing it in bf16 flips far more."""
    generator = torch.Generator().manual_seed(5)
    states_TD = torch.randn(40_000, 64, generator=generator).to(torch.bfloat16)
    position_T = one_document(40_000)
    reference = threshold_boundaries(probability_of(states_TD.double()), position_T)
    prob_T = probability_of(states_TD)
    assert prob_T.dtype == torch.float32
    flipped = (threshold_boundaries(prob_T, position_T) != reference).double().mean()
    unit_TD = torch.nn.functional.normalize(states_TD, dim=-1)
    coarse_T = (unit_TD[:-1] * unit_TD[1:]).sum(-1)
    coarse = torch.nn.functional.pad(coarse_T <= 0, (1, 0), value=True)
    assert flipped < 5e-4
    assert (coarse != reference).double().mean() > 5e-4, "the control must show the difference"


def test_the_histogram_counts_tokens_that_have_a_predecessor() -> None:
    """Document starts have p = 1 by decree and say nothing of the threshold."""
    packing = packing_from_offsets(torch.tensor([0, 3, 6]), 6)
    prob_T = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 0.99999])
    histogram = probability_histogram(prob_T, packing.position)
    assert histogram.sum() == 4
    assert histogram[0] == 1
    assert histogram[-1] == 2
    assert histogram[NUM_PROBABILITY_BINS // 2] == 1


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
def test_the_share_is_the_inverse_of_the_quantile(share: float) -> None:
    prob_T = torch.rand(20_001, generator=torch.Generator().manual_seed(7)) ** 2
    histogram = probability_histogram(prob_T, one_document(20_001))
    quantile = float(histogram_quantile(histogram, share))
    assert histogram_share(histogram, quantile) == pytest.approx(share, abs=1e-4)
    assert histogram_share(histogram, 0.0) == 1.0
    assert histogram_share(histogram, 1.0) == 0.0


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_balance_makes_both_kinds_of_flips_equally_many(power: float) -> None:
    """Expected counts over all tokens, in fp64, with boundaries frequent, even and rare."""
    prob_T = torch.rand(200_001, generator=torch.Generator().manual_seed(8)).double() ** power
    position_T = one_document(prob_T.numel())
    balance = draw_balance(probability_histogram(prob_T, position_T), 6.0)
    assert balance is not None
    assert {0.5: balance > 1.2, 1.0: 0.95 < balance < 1.05, 3.0: balance < 0.8}[power]
    sharp_T, above_T = sharpen(prob_T, 6.0)[1:], (prob_T >= 0.5)[1:]
    falling = float((1 - sharp_T)[above_T].sum()) * min(1 / balance, 1)
    rising = float(sharp_T[~above_T].sum()) * min(balance, 1)
    assert falling == pytest.approx(rising, rel=1e-3)
    # the draws do what is expected of them
    sampling = BoundarySampling(0, 3, torch.arange(prob_T.numel()))
    drawn_T = sample_boundaries(prob_T, 6.0, sampling, position_T, torch.tensor(balance))[1:]
    assert float((~drawn_T & above_T).sum()) == pytest.approx(falling, rel=0.05)
    assert float((drawn_T & ~above_T).sum()) == pytest.approx(rising, rel=0.05)


def test_a_balance_of_one_draws_as_none_does() -> None:
    prob_T = torch.rand(5_000, generator=torch.Generator().manual_seed(9))
    sampling = BoundarySampling(0, 3, torch.arange(prob_T.numel()))
    draws = [
        sample_boundaries(prob_T, 6.0, sampling, one_document(5_000), balance)
        for balance in (None, torch.tensor(1.0), torch.tensor(0.3))
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("prob", "balance"), [(0.2, 1e-3), (0.8, 1e3)])
def test_the_balance_is_bounded_where_all_tokens_lie_on_one_side(
    prob: float, balance: float
) -> None:
    histogram = probability_histogram(torch.full((100,), prob), one_document(100))
    assert draw_balance(histogram, 6.0) == balance
    assert draw_balance(torch.zeros_like(histogram), 6.0) is None


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
def test_the_quantile_leaves_the_wanted_share_above(share: float) -> None:
    """Mode `rule` tracks this number; its error is below one bin."""
    prob_T = torch.rand(20_001, generator=torch.Generator().manual_seed(6)) ** 2
    histogram = probability_histogram(prob_T, one_document(20_001))
    quantile = float(histogram_quantile(histogram, share))
    assert abs(float((prob_T[1:] >= quantile).double().mean()) - share) < 2e-3
    empty = torch.zeros(NUM_PROBABILITY_BINS, dtype=torch.int64)
    assert float(histogram_quantile(empty, share)) in (0.0, 1 / NUM_PROBABILITY_BINS)
