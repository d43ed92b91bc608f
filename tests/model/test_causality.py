"""No logit depends on a later token, in every mode that ships (peers' list 1-4, 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.ops.boundary import BoundarySampling
from tests.support.causality_probes import (
    all_leaks,
    gradient_leak,
    replacement_leak,
    truncation_leak,
)
from tests.support.tiny_models import (
    ALIGNS,
    EXTRA_VARIANTS,
    SMOOTHINGS,
    VARIANTS,
    WEIGHTINGS,
    force_boundaries,
    random_documents,
    tiny_model,
    variant_name,
)

NUM_TOKENS = 14
each_variant = pytest.mark.parametrize("options", VARIANTS + EXTRA_VARIANTS, ids=variant_name)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@each_mode
@each_variant
def test_no_gradient_reaches_a_later_token(options: dict[str, Any], training: bool) -> None:
    """Peers' list 1; in `ema_ste` the logarithms of the moving average leave rounding noise."""
    model = tiny_model(training=training, **options)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=1)
    noise = 1e-14 if model.config.boundary_mode == "ema_ste" else 0.0
    assert gradient_leak(model, tokens_T).size <= noise


@each_mode
@each_variant
def test_replacing_a_token_changes_nothing_before_it(
    options: dict[str, Any], training: bool
) -> None:
    """Peers' list 2 and 7: neither logits nor boundaries; the probes do flip boundaries."""
    model = tiny_model(training=training, **options)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=2)
    leak = replacement_leak(model, tokens_T)
    assert leak.size < 1e-12
    assert not leak.boundaries_changed
    if model.config.boundary_mode == "fixed":
        assert leak.flipped_share == 0.0
    else:
        assert leak.flipped_share >= 0.2, "too few probes move a boundary to prove anything"


@each_mode
@each_variant
def test_a_prefix_has_the_logits_of_the_whole_document(
    options: dict[str, Any], training: bool
) -> None:
    """Peers' list 3."""
    model = tiny_model(training=training, **options)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=3)
    assert truncation_leak(model, tokens_T).size < 1e-12


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "every_token": lambda position: position >= 0,
    "first_token_only": lambda position: position == 0,
    "alternate": lambda position: position % 2 == 0,
    "irregular": lambda position: (position * 2654435761 >> 7) % 3 == 0,
}


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_probe_finds_a_leak_when_boundaries_are_given(
    pattern: str, align: str, weighting: str, smoothing: str
) -> None:
    """Peers' list 4: pooling, smoothing and reading alone, whatever the detector decides."""
    model = tiny_model(segment_align=align, concept_weighting=weighting, smoothing=smoothing)
    force_boundaries(model, PATTERNS[pattern])
    (tokens_T,) = random_documents([NUM_TOKENS], seed=4)
    mask_T = model(tokens_T, torch.tensor([0, NUM_TOKENS])).boundary_mask_T
    assert mask_T is not None
    assert torch.equal(mask_T[1:], PATTERNS[pattern](torch.arange(NUM_TOKENS))[1:])
    leaks = all_leaks(model, tokens_T)
    assert leaks["gradient"] == 0.0
    assert leaks["replacement"] < 1e-12
    assert leaks["truncation"] < 1e-12


@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "ema_ste"])
def test_sampled_boundaries_of_a_prefix_do_not_depend_on_what_follows(mode: str) -> None:
    """Peers' list 7: draws are counted by the token, not by how many were made before."""
    model = tiny_model(training=True, boundary_mode=mode, sharpening=1.0)
    (tokens_T,) = random_documents([48], seed=5)
    for step in range(4):
        index_T = 1000 * step + torch.arange(48)
        whole = model.boundaries(
            tokens_T, torch.tensor([0, 48]), BoundarySampling(7, step, index_T)
        )
        assert bool((whole.mask_T != whole.threshold_mask_T).any()), "the draws must matter"
        for length in (1, 2, 17, 47):
            part = model.boundaries(
                tokens_T[:length],
                torch.tensor([0, length]),
                BoundarySampling(7, step, index_T[:length]),
            )
            assert torch.equal(part.mask_T, whole.mask_T[:length])


def test_sampled_boundaries_change_with_seed_step_and_token_index() -> None:
    """Peers' list 7: the three parts of the key all enter the draw."""
    model = tiny_model(training=True, sharpening=1.0)
    (tokens_T,) = random_documents([64], seed=6)
    whole, index_T = torch.tensor([0, 64]), torch.arange(64)

    def drawn(seed: int, step: int, index_T: Tensor) -> Tensor:
        return model.boundaries(tokens_T, whole, BoundarySampling(seed, step, index_T)).mask_T

    reference = drawn(0, 0, index_T)
    assert torch.equal(reference, drawn(0, 0, index_T))
    for other in (drawn(1, 0, index_T), drawn(0, 1, index_T), drawn(0, 0, index_T + 64)):
        assert not torch.equal(reference, other)
