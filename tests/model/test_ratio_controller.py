"""The ratio loss as a controller of the boundary rate (peers' list 31)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig, config_from_dict
from megadlcm.model import build_model
from megadlcm.model.chunking import BoundaryDetector
from megadlcm.ops.boundary import BoundarySampling, sharpen
from megadlcm.ops.compression import ratio_gradient_scale
from megadlcm.ops.packing import packing_from_offsets
from megadlcm.training.optimizer import parameter_groups
from tests.tiny_models import tiny_config


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


def boundary_fractions(config: RunConfig, start: float, steps: int, common: float) -> list[float]:
    """F of each step when the ratio loss alone moves the detector over fixed states."""
    model = build_model(config.model, config.mup)
    detector = model.boundary_detector.train()
    groups = [g for g in parameter_groups(model, config) if g["mup_group"] == "boundary"]
    optimizer = torch.optim.AdamW(groups)
    hidden_TD = encoder_like_states(4096, common)
    packing = packing_from_offsets(torch.tensor([0, 4096]), 4096)
    with torch.no_grad():
        start_at(detector, detector.cosine(hidden_TD)[1:], start)
    fractions = []
    for step in range(steps):
        output = detector(hidden_TD, packing, BoundarySampling(0, step, packing.position))
        fraction = output.mask_T.double().mean()
        fractions.append(float(fraction))
        scale = ratio_gradient_scale(fraction, config.model.target_tokens_per_concept)
        optimizer.zero_grad()
        (config.training.ratio_loss_weight * scale * output.prob_T.double().mean()).backward()
        optimizer.step()
    return fractions


def relative_tail(fractions: list[float], ratio: float, settled: int) -> Tensor:
    """R F of the steps after `settled`; 1 is the target."""
    return ratio * torch.tensor(fractions[settled:], dtype=torch.float64)


@pytest.mark.parametrize("common", [0.25, 0.7])
@pytest.mark.parametrize(
    ("start", "ratio"), [(0.02, 4.0), (0.25, 4.0), (0.9, 4.0), (0.25, 2.0), (0.25, 8.0)]
)
def test_the_ratio_loss_alone_brings_the_fraction_to_its_target(
    start: float, ratio: float, common: float
) -> None:
    """At the default rates: within 5 % after 100 steps, and no swing above 10 %."""
    fractions = boundary_fractions(controlled_run(ratio), start, steps=180, common=common)
    assert abs(fractions[0] - start) < 0.03
    tail = relative_tail(fractions, ratio, settled=100)
    assert (tail.unfold(0, 20, 1).mean(1) - 1).abs().max() < 0.05
    assert (tail - 1).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("start", [0.02, 0.25])
def test_where_cosines_differ_little_the_fraction_is_right_on_average(start: float) -> None:
    """A step of the same rate then moves many tokens, so single steps may be far off."""
    fractions = boundary_fractions(controlled_run(4.0), start, steps=200, common=4.0)
    assert abs(relative_tail(fractions, 4.0, settled=100).mean() - 1) < 0.1


def test_a_tenfold_rate_swings_and_without_a_rate_nothing_moves() -> None:
    """Negative controls of the controller."""
    fast = controlled_run(4.0, boundary_learning_rate=3e-3)
    tail = relative_tail(boundary_fractions(fast, 0.25, steps=180, common=1.0), 4.0, settled=100)
    assert (tail - 1).square().mean().sqrt() > 0.1
    still = controlled_run(4.0, boundary_learning_rate=0.0)
    tail = relative_tail(boundary_fractions(still, 0.9, steps=20, common=1.0), 4.0, settled=0)
    assert (tail - 3.6).abs().max() < 0.1
