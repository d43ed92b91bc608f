"""The ratio loss as a controller of the boundary rate (peers' list 31)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig, config_from_dict
from megadlcm.engine.objective import Objective, StepSummary, StepTotals
from megadlcm.engine.optimizer import parameter_groups
from megadlcm.engine.ratio_control import LINEAR_EPS, RatioController
from megadlcm.engine.state import TrainState
from megadlcm.model import build_model
from megadlcm.model.boundary_detector import BoundaryDetector
from megadlcm.model.output import ModelOutput
from megadlcm.ops.boundary import NUM_PROBABILITY_BINS, BoundarySampling, sharpen
from megadlcm.ops.packing import packing_from_offsets
from megadlcm.parallel.mesh import ParallelMesh
from tests.support.tiny_models import tiny_config

EVENLY = torch.ones(NUM_PROBABILITY_BINS, dtype=torch.long)
"""A histogram of probabilities that are spread evenly."""


def controlled_run(ratio: float, **optimizer: Any) -> RunConfig:
    """A run of which only the detector and its optimizer settings are used."""
    model = {
        key: getattr(tiny_config(), key)
        for key in ("vocab_size", "encoder_layers", "backbone_layers", "decoder_layers")
    }
    widths = {"d_token": 64, "d_concept": 64, "token_ffn_size": 64, "concept_ffn_size": 64}
    heads = ("token_heads", "token_kv_heads", "concept_heads", "concept_kv_heads")
    return config_from_dict(
        {
            "name": "controller",
            "output_dir": "controller",
            "model": model
            | widths
            | dict.fromkeys(heads, 4)
            | {"target_tokens_per_concept": ratio},
            "training": {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
            "optimizer": optimizer,
        }
    )


def encoder_like_states(num_tokens: int, common: float) -> Tensor:
    """States that vary in sixteen directions and share one.

    Cosines of neighbours are 0.08 +- 0.26 with `common` = 0.25, as in fresh encoders, 0.4 +- 0.2
    with 0.7 and 0.96 +- 0.02 with 4.
    """
    generator = torch.Generator().manual_seed(36)
    directions = torch.randn(16, 64, generator=generator)
    amounts = torch.randn(num_tokens, 16, generator=generator)
    return amounts @ directions / 4.0 + common * torch.randn(64, generator=generator)


def start_at(detector: BoundaryDetector, cosine_T: Tensor, share: float) -> None:
    """Sets the offset so that this share of the draws is a boundary."""
    low, high = -2.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        prob_T = ((1 - cosine_T + middle) / 2).clamp(0, 1)
        drawn = float(sharpen(prob_T, detector.config.sharpening).mean())
        low, high = (middle, high) if drawn < share else (low, middle)
    detector.offset.fill_(low)


def boundary_fractions(
    config: RunConfig, start: float, steps: int, common: float, document: int = 4096
) -> list[float]:
    """F of each step when the ratio loss alone moves the detector over fixed states."""
    model = build_model(config.model, config.mup)
    detector = model.boundary_detector.train()
    groups = [g for g in parameter_groups(model, config) if g["mup_group"] == "boundary"]
    optimizer = torch.optim.AdamW(groups)
    objective = Objective(config, one_process())
    controller, state = RatioController(config), TrainState()
    hidden_TD = encoder_like_states(4096, common)
    packing = packing_from_offsets(torch.arange(0, 4097, document), 4096)
    with torch.no_grad():
        start_at(detector, detector.cosine(hidden_TD)[packing.position > 0], start)
    fractions: list[float] = []
    delayed = config.training.ratio_statistics == "previous_step"
    for step in range(steps):
        output = detector(hidden_TD, packing, BoundarySampling(0, step, packing.position))
        optimizer.zero_grad()
        flat = ModelOutput(torch.zeros(4096, 2), packing, output)
        previous = torch.tensor(fractions[-1]) if delayed and fractions else None
        totals = StepTotals(4096, previous)
        loss = objective.ratio_loss(output, packing, totals)
        assert loss is not None
        loss.backward()
        stats = objective(flat, torch.zeros(4096, dtype=torch.long), totals).stats
        fractions.append(StepSummary.from_sums(stats.sums.tolist()).boundary_fraction)
        used = fractions[-1] if previous is None else float(previous)
        if optimizer.param_groups[0]["steered"]:
            norm = float(torch.nn.utils.clip_grad_norm_(detector.parameters(), math.inf))
            size = controller.step_size(used, stats.prob_histogram, norm, state)
            optimizer.param_groups[0]["lr"] = controller.adamw_rate(size, norm)
        optimizer.step()
        detector.track_balance(stats.prob_histogram)
    return fractions


def one_process() -> ParallelMesh:
    """A mesh that needs no process group."""
    return ParallelMesh(0, 1, 0, torch.device("cpu"))


def relative_tail(fractions: list[float], ratio: float, settled: int) -> Tensor:
    """R F of the steps after `settled`; 1 is the target."""
    return ratio * torch.tensor(fractions[settled:], dtype=torch.float64)


@pytest.mark.parametrize(
    ("start", "ratio", "common"),
    [
        *itertools.product([0.02, 0.25, 0.9], [4.0], [0.25, 0.7]),
        *itertools.product([0.25], [2.0, 8.0], [0.25, 0.7]),
        # not from 0.9: nearly parallel states cannot be taken far apart by a small change of W
        *itertools.product([0.02, 0.25], [2.0, 4.0, 8.0], [4.0]),
        (0.25, 4.0, 30.0),  # cosines of 0.9993 +- 0.0004
    ],
)
def test_the_ratio_loss_alone_brings_the_fraction_to_its_target(
    start: float, ratio: float, common: float
) -> None:
    """Within 5 % after 40 steps and no swing above 10 %, however close the cosines lie together."""
    fractions = boundary_fractions(controlled_run(ratio), start, steps=100, common=common)
    assert abs(fractions[0] - start) < 0.03
    tail = relative_tail(fractions, ratio, settled=40)
    assert (tail.unfold(0, 20, 1).mean(1) - 1).abs().max() < 0.05
    assert (tail - 1).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_a_balanced_draw_is_steered_to_its_target(ratio: float) -> None:
    config = controlled_run(ratio)
    config = replace(config, model=replace(config.model, balanced_draw=True))
    fractions = boundary_fractions(config, 1 / ratio, steps=100, common=0.7)
    tail = relative_tail(fractions, ratio, settled=40)
    assert abs(tail.mean() - 1) < 0.02
    assert (tail - 1).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("ratio", [1.2, 1.4])
def test_a_target_near_one_is_reached(ratio: float) -> None:
    fractions = boundary_fractions(controlled_run(ratio), 0.5, steps=60, common=0.25)
    tail = relative_tail(fractions, ratio, settled=30)
    assert (tail - 1).abs().max() < 0.05


@pytest.mark.parametrize("document", [128, 512])
def test_the_ratio_loss_of_each_document_is_steered_as_well(document: int) -> None:
    config = controlled_run(4.0)
    config = replace(config, model=replace(config.model, boundary_mode="learned_local"))
    fractions = boundary_fractions(config, 0.4, steps=80, common=0.7, document=document)
    tail = relative_tail(fractions, 4.0, settled=40)
    # each document pulls to its own target, which is not exactly that of all tokens
    assert abs(tail.mean() - 1) < 0.05
    assert (tail - tail.mean()).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("start", [0.1, 0.4])
def test_statistics_of_the_step_before_do_not_oscillate(start: float) -> None:
    config = controlled_run(4.0, boundary_gain=1.0)
    config = replace(config, training=replace(config.training, ratio_statistics="previous_step"))
    fractions = boundary_fractions(config, start, steps=80, common=0.7)
    tail = relative_tail(fractions, 4.0, settled=40)
    assert (tail - 1).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("loss_weight", [1e-3, 1.0])
def test_each_step_takes_back_the_stated_share_of_the_error(loss_weight: float) -> None:
    """Whatever the weight of the loss; to first order, and as far as one density describes all."""
    kept = {}
    for gain in (0.2, 0.5):
        config = controlled_run(4.0, boundary_gain=gain)
        training = replace(config.training, ratio_loss_weight=loss_weight)
        fractions = boundary_fractions(replace(config, training=training), 0.4, 5, common=0.7)
        # in each of two steps
        kept[gain] = ((fractions[2] - 0.25) / (fractions[0] - 0.25)) ** 0.5
        assert abs(kept[gain] - (1 - gain)) < 0.15
    assert kept[0.2] - kept[0.5] > 0.15


def test_adamw_swings_and_without_a_loss_nothing_moves() -> None:
    """Negative controls: the same loop without the computed step size, at the usual rate."""
    adamw = controlled_run(4.0, boundary_gain=0.0)
    tail = relative_tail(boundary_fractions(adamw, 0.25, steps=100, common=4.0), 4.0, settled=40)
    assert (tail - 1).square().mean().sqrt() > 0.1
    config = controlled_run(4.0)
    still = replace(config, training=replace(config.training, ratio_loss_weight=1e-12))
    still = replace(still, optimizer=replace(still.optimizer, boundary_gain=0.0))
    tail = relative_tail(boundary_fractions(still, 0.9, steps=5, common=1.0), 4.0, settled=0)
    assert (tail - 3.6).abs().max() < 0.2


def test_the_rate_makes_up_for_clipping_and_is_zero_without_a_gradient() -> None:
    controller, state = RatioController(controlled_run(4.0)), TrainState()
    free, clipped = (controller.adamw_rate(2.0, norm) for norm in (0.9, 5.0))
    assert free == 2.0 * LINEAR_EPS and clipped == pytest.approx(5.0 * free)
    assert controller.step_size(0.4, EVENLY, 0.0, state) == 0.0
    assert state == TrainState()  # a vanished gradient says nothing about the next one


def test_no_step_moves_the_mean_probability_far() -> None:
    controller = RatioController(controlled_run(4.0))
    slope = 4.0 * (4.0 * 0.9 - 1.0) / 3.0
    norm = 0.03 * slope * 0.5  # |u| = 0.5
    size = controller.step_size(0.9, EVENLY, norm, TrainState())
    assert size * norm * 0.5 == pytest.approx(0.05)


def test_a_saturated_detector_does_not_run_away() -> None:
    """Where F cannot be moved the gradient vanishes, and a step as large as 1 / |u| would not."""
    controller, state = RatioController(controlled_run(4.0)), TrainState()
    moves = []
    for step in range(2000):
        norm = 0.9**step
        moves.append(norm * controller.step_size(0.9, EVENLY, norm, state))
    assert max(moves) <= 0.02 * math.sqrt(2 * 64) * 1.0001 and math.isfinite(sum(moves))


def test_segments_shorter_than_the_target_are_refused() -> None:
    with pytest.raises(InputError, match=r"max_segment_tokens = 3, must be >= "):
        tiny_config(max_segment_tokens=3, target_tokens_per_concept=4.0)
