"""The threshold of evaluation gives the target ratio, and a balanced draw agrees with 0.5."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megadlcm.model.boundary_detector import BoundaryDetector, BoundaryOutput
from megadlcm.ops.boundary import (
    NUM_PROBABILITY_BINS,
    BoundarySampling,
    draw_balance,
    probability_histogram,
)
from megadlcm.ops.packing import Packing, packing_from_offsets
from tests.support.tiny_models import similar_states, tiny_config


def test_the_tracked_threshold_reaches_the_quantile_that_gives_the_ratio() -> None:
    """Mode `rule`: geometric approach, then R; and it follows when the states change."""
    config = tiny_config(boundary_mode="rule", target_tokens_per_concept=4.0)
    detector = BoundaryDetector(config)
    assert detector.tracks_threshold and not detector.calibrates
    states_TD = similar_states(20_000, 16, common=0.7)
    packing = packing_from_offsets(torch.tensor([0, 20_000]), 20_000)
    sampling = BoundarySampling(0, 0, packing.position)
    for spread in (1.0, 0.6):
        hidden_TD = states_TD.mean(0) + spread * (states_TD - states_TD.mean(0))
        output = detector(hidden_TD, packing, sampling)
        quantile = float(output.prob_T[1:].quantile(0.75))
        start = float(detector.threshold) - quantile
        assert abs(output.mask_T.double().mean() * 4 - 1) > 0.3, "starts away from its target"
        for step in range(1, 41):
            histogram = probability_histogram(output.prob_T, packing.position)
            detector.track_threshold(histogram, 20_000, 0)
            left = float(detector.threshold) - quantile
            assert abs(left - start * 0.9**step) < 2e-3
        mask_T = detector(hidden_TD, packing, sampling).mask_T
        assert abs(mask_T.double().mean() * 4 - 1) < 0.05


class Scored(NamedTuple):
    """A detector, states whose neighbours differ in all degrees, and short documents of them."""

    detector: BoundaryDetector
    states_TD: Tensor
    packing: Packing

    def output(self, step: int = 0) -> BoundaryOutput:
        """What the detector says in its present mode."""
        index_T = torch.arange(len(self.states_TD))
        return self.detector(self.states_TD, self.packing, BoundarySampling(0, step, index_T))


def scored(**options: Any) -> Scored:
    """One token in forty starts a document."""
    detector = BoundaryDetector(tiny_config(**options))
    for matrix in (detector.w_q, detector.w_k):
        if matrix is not None:
            torch.nn.init.eye_(matrix.weight)
    states_TD = similar_states(20_000, 16, common=0.4)
    packing = packing_from_offsets(torch.arange(0, 20_001, 40), 20_000)
    return Scored(detector, states_TD, packing)


def share_of(mask_T: Tensor) -> float:
    return float(mask_T.double().mean())


@pytest.mark.parametrize("limit", [0, 12])
@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "ema_ste", "rule"])
def test_evaluation_compresses_to_the_target_whatever_is_drawn(
    mode: str, ratio: float, limit: int
) -> None:
    """Document starts and forced boundaries count; at 0.5 the ratio is another one."""
    case = scored(boundary_mode=mode, target_tokens_per_concept=ratio, max_segment_tokens=limit)
    detector = case.detector
    untracked = share_of(case.output().threshold_mask_T)
    for _ in range(120):
        output = case.output()
        histogram = probability_histogram(output.prob_T, case.packing.position)
        made = float(output.threshold_mask_T.sum())
        detector.track_threshold(histogram, 20_000, made)
    detector.eval()
    assert share_of(case.output().mask_T) == pytest.approx(1 / ratio, rel=0.01)
    assert abs(untracked * ratio - 1) > 0.05, "the target must not be met at 0.5 already"
    detector.config = dataclasses.replace(detector.config, max_segment_tokens=0)
    forced = 1 / ratio - share_of(case.output().mask_T)
    assert (forced > 0.01) == (limit > 0 and ratio == 8.0), "where segments are long, some end so"


def test_a_step_without_scores_moves_no_threshold_and_no_balance() -> None:
    """Every token a document of its own: there is no neighbour to compare."""
    detector = scored(balanced_draw=True).detector
    nothing = torch.zeros(NUM_PROBABILITY_BINS, dtype=torch.int64)
    before = dict(detector.state_dict())
    detector.track_threshold(nothing, 100, 100)
    detector.track_balance(nothing)
    detector.calibrate(torch.zeros(0))
    assert all(torch.equal(before[name], now) for name, now in detector.state_dict().items())


def test_a_run_that_stops_tracking_thresholds_at_half_again() -> None:
    """Whatever threshold was saved; the key may change when a run is resumed."""
    case = scored()
    detector = case.detector.eval()
    detector.threshold.fill_(0.3)
    tracked_T = case.output().mask_T
    detector.config = dataclasses.replace(detector.config, track_threshold=False)
    paper_T = case.output().mask_T
    prob_T = case.output().prob_T
    assert torch.equal(paper_T, (prob_T >= 0.5) | (case.packing.position == 0))
    assert not torch.equal(paper_T, tracked_T)


def test_tracking_changes_nothing_that_is_drawn() -> None:
    case = scored()
    drawn_T = case.output().mask_T
    case.detector.threshold.fill_(0.3)
    assert torch.equal(case.output().mask_T, drawn_T)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_a_balanced_draw_makes_as_many_boundaries_as_its_threshold(ratio: float) -> None:
    """The plain draw makes far more of them where boundaries are rare, fewer where they are not."""
    drawn, coins = {}, {}
    for balanced in (False, True):
        case = scored(target_tokens_per_concept=ratio, balanced_draw=balanced)
        detector = case.detector
        with torch.no_grad():
            cosine_T = detector.cosine(case.states_TD)[case.packing.position > 0]
        detector.calibrate(cosine_T)
        masks = [case.output(step).mask_T for step in range(20)]
        thresholded_T = case.output().threshold_mask_T  # at 0.5: nothing was tracked
        drawn[balanced] = sum(share_of(mask_T) for mask_T in masks) / 20
        flipped = sum(share_of(mask_T & ~thresholded_T) for mask_T in masks) / 20
        coins[balanced] = flipped / drawn[balanced]
        if balanced:
            assert drawn[True] == pytest.approx(share_of(thresholded_T), rel=0.01)
            if ratio == 2.0:
                assert float(detector.balance) == pytest.approx(1.0, abs=0.25)
    if ratio != 2.0:
        lean = drawn[False] / drawn[True] - 1
        assert (lean > 0.05) if ratio > 2.0 else (lean < -0.01)
    assert coins[True] < coins[False] or ratio < 4.0


def test_the_balance_follows_the_probabilities_and_is_saved_where_it_is_used() -> None:
    case = scored(target_tokens_per_concept=4.0, balanced_draw=True)
    detector = case.detector
    assert float(detector.balance) == pytest.approx(1 / 3)
    histogram = probability_histogram(case.output().prob_T, case.packing.position)
    goal = draw_balance(histogram, detector.config.sharpening)
    for step in range(1, 41):
        detector.track_balance(histogram)
        assert float(detector.balance) - goal == pytest.approx((1 / 3 - goal) * 0.9**step, abs=1e-5)
    assert abs(1 / 3 - goal) > 0.05
    # in fp32 whatever the model is cast to
    detector.to(torch.bfloat16)
    assert detector.balance.dtype == torch.float32
    assert "balance" in detector.state_dict()
    assert "balance" not in scored().detector.state_dict()
