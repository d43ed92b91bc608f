"""The causality probes catch the leaks that they are there for (peers' list 5 and 6)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megadlcm.ops.packing import packing_from_offsets
from megadlcm.ops.segments import concept_layout
from tests.support.causality_probes import (
    all_leaks,
    gradient_leak,
    replacement_leak,
    truncation_leak,
)
from tests.support.leaking_variants import (
    use_literal_layout,
    use_own_last_token_layout,
    use_symmetric_smoothing,
)
from tests.support.tiny_models import (
    ALIGNS,
    SMOOTHINGS,
    WEIGHTINGS,
    random_documents,
    tiny_config,
    tiny_model,
)

NUM_TOKENS = 14
LEAK = 1e-3
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@each_mode
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_literal_reading_of_the_paper_fails_every_probe(
    monkeypatch: pytest.MonkeyPatch, weighting: str, smoothing: str, training: bool
) -> None:
    """Peers' list 5: opening segments that are seen from their first token leak."""
    use_literal_layout(monkeypatch)
    model = tiny_model(training=training, concept_weighting=weighting, smoothing=smoothing)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=11)
    assert gradient_leak(model, tokens_T).size > LEAK
    assert replacement_leak(model, tokens_T).size > LEAK
    assert truncation_leak(model, tokens_T).size > LEAK


@each_mode
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_seeing_a_segment_from_its_own_last_token_leaks_without_a_gradient(
    monkeypatch: pytest.MonkeyPatch, weighting: str, smoothing: str, training: bool
) -> None:
    """Peers' list 5: gradients find nothing, replaced tokens and cut documents do."""
    use_own_last_token_layout(monkeypatch)
    model = tiny_model(
        training=training,
        segment_align="start_shift",
        concept_weighting=weighting,
        smoothing=smoothing,
    )
    (tokens_T,) = random_documents([NUM_TOKENS], seed=12)
    assert gradient_leak(model, tokens_T).size == 0.0
    assert replacement_leak(model, tokens_T).size > LEAK
    assert truncation_leak(model, tokens_T).size > LEAK


@each_mode
@pytest.mark.parametrize("align", ALIGNS)
def test_smoothing_that_looks_right_fails_every_probe(
    monkeypatch: pytest.MonkeyPatch, align: str, training: bool
) -> None:
    """Peers' list 6, at the level of the model."""
    use_symmetric_smoothing(monkeypatch)
    model = tiny_model(training=training, segment_align=align)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=13)
    assert all(size > LEAK for size in all_leaks(model, tokens_T).values())


@pytest.mark.parametrize("align", ["start_literal", "start", "open", "first", ""])
def test_no_config_can_name_a_leaking_alignment(align: str) -> None:
    """Peers' list 5: the variants above exist in tests only."""
    with pytest.raises(ValueError, match="segment_align"):
        tiny_config(segment_align=align)


@pytest.mark.parametrize("smoothing", ["conv", "symmetric", ""])
def test_no_config_can_name_another_smoothing(smoothing: str) -> None:
    """Peers' list 6."""
    with pytest.raises(ValueError, match="smoothing"):
        tiny_config(smoothing=smoothing)


def test_a_concept_is_seen_only_once_all_its_tokens_and_its_boundary_are_read() -> None:
    """Peers' list 5: the property that makes every alignment of the layout causal."""
    generator = torch.Generator().manual_seed(0)
    for align in ALIGNS:
        for _ in range(50):
            mask_T = torch.rand(30, generator=generator) < 0.4
            packing = packing_from_offsets(torch.tensor([0, 11, 12, 30]), 30)
            mask_T |= packing.position == 0
            layout = concept_layout(mask_T, packing, align)
            for concept in range(layout.num_concepts):
                seen_from = int((layout.visible_concept_T == concept).nonzero()[0])
                pooled = (layout.pooled_concept_T == concept).nonzero().flatten()
                assert seen_from == int(layout.boundary_position_M[concept])
                assert bool(mask_T[seen_from])
                assert bool((pooled <= seen_from).all())


def test_models_differ_between_the_two_causal_alignments() -> None:
    """A guard against an option that is read nowhere."""
    tokens_T, whole = random_documents([NUM_TOKENS], seed=14)[0], torch.tensor([0, NUM_TOKENS])
    end = tiny_model(segment_align="end")
    shifted = tiny_model(segment_align="start_shift")
    shifted.load_state_dict(
        end.state_dict() | {"concept_pool.null_concept": torch.zeros(24, dtype=torch.float64)}
    )
    assert torch.equal(
        end.boundaries(tokens_T, whole).mask_T, shifted.boundaries(tokens_T, whole).mask_T
    )
    assert not torch.allclose(
        end(tokens_T, whole).logits_TV, shifted(tokens_T, whole).logits_TV, atol=1e-3
    )
    uniform = tiny_model(concept_weighting="uniform")
    assert dataclasses.asdict(uniform.config) != dataclasses.asdict(end.config)
    assert not torch.allclose(
        end(tokens_T, whole).logits_TV, uniform(tokens_T, whole).logits_TV, atol=1e-3
    )
