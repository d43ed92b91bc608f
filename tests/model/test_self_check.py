"""The check that opens a run passes on honest models and stops leaking ones (peers' list 8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadlcm.config import MupConfig
from megadlcm.model import build_model
from megadlcm.model.self_check import check_causality
from tests.support.leaking_variants import (
    use_literal_layout,
    use_own_last_token_layout,
    use_symmetric_smoothing,
)
from tests.support.tiny_models import (
    ALIGNS,
    BOUNDARY_MODES,
    EXTRA_VARIANTS,
    neighbour_cosines,
    random_documents,
    tiny_config,
    tiny_model,
    variant_name,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_every_shipped_mode_passes(mode: str, align: str, dtype: torch.dtype) -> None:
    """Peers' list 8."""
    model = tiny_model(boundary_mode=mode, segment_align=align)
    check_causality(model.to(dtype))


@pytest.mark.parametrize("options", EXTRA_VARIANTS, ids=variant_name)
def test_rare_options_pass(options: dict[str, Any]) -> None:
    """Peers' list 8."""
    check_causality(tiny_model(**options), tokens=32)


@pytest.mark.parametrize("tokens", [2, 3, 64])
def test_the_dense_control_passes(tokens: int) -> None:
    """Peers' list 8."""
    check_causality(build_model(tiny_config(architecture="dense")), tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", ["ema", "none"])
def test_a_leak_through_pooled_tokens_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, smoothing: str, dtype: torch.dtype
) -> None:
    """Peers' list 8, negative control."""
    use_literal_layout(monkeypatch)
    with pytest.raises(RuntimeError, match=r"token replaced: logits.: position \d+"):
        check_causality(tiny_model(smoothing=smoothing).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_leak_through_the_decision_alone_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Peers' list 8, negative control."""
    use_own_last_token_layout(monkeypatch)
    with pytest.raises(RuntimeError, match="causality check failed"):
        check_causality(tiny_model(segment_align="start_shift").to(dtype))


def test_a_leak_through_smoothing_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers' list 8, negative control."""
    use_symmetric_smoothing(monkeypatch)
    with pytest.raises(RuntimeError, match="causality check failed"):
        check_causality(tiny_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_freshly_initialised_model_is_checked_as_sharply(
    monkeypatch: pytest.MonkeyPatch, calibrated: bool, dtype: torch.dtype
) -> None:
    """Peers' list 8: at the first step concepts are read weakly, and the leak must show anyway."""
    config = tiny_config(
        d_token=64, d_concept=128, concept_heads=8, concept_kv_heads=4, vocab_size=512
    )
    model = build_model(config, MupConfig())
    if calibrated:
        (tokens_T,) = random_documents([64], seed=3)
        cosine = neighbour_cosines(model, tokens_T, torch.tensor([0, 64]))
        model.boundary_detector.calibrate(cosine)
    model.to(dtype)
    check_causality(model)
    use_literal_layout(monkeypatch)
    with pytest.raises(RuntimeError, match="causality check failed"):
        check_causality(model)


def test_a_model_that_returns_nan_does_not_pass() -> None:
    """Peers' list 8: a comparison with NaN is false."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits"):
        check_causality(model)


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_no_trace(training: bool) -> None:
    """Peers' list 8: modes, buffers, gradients and the random state stay as they were."""
    model = tiny_model(training=training)
    model.decoder.train(not training)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_causality(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_when_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers' list 8."""
    use_literal_layout(monkeypatch)
    model = tiny_model(training=True)
    with pytest.raises(RuntimeError):
        check_causality(model)
    assert all(module.training for module in model.modules())
