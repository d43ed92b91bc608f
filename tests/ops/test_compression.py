"""The ratio loss and its gradient against closed forms (peers' list 28)."""

from __future__ import annotations

import itertools

import pytest
import torch

from megadlcm.ops.compression import ratio_gradient_scale, ratio_loss

TARGETS = (1.5, 2.0, 4.0, 8.0, 64.0)
GRID = [
    (fraction, prob, target)
    for fraction, prob, target in itertools.product(
        (0.0, 0.05, 0.125, 0.25, 0.5, 0.9, 1.0), (0.0, 0.1, 0.25, 0.7, 1.0), TARGETS
    )
]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_the_product_of_both_deviations(target: float) -> None:
    """The paper's expression factors: L = (R F - 1)(R G - 1) / (R - 1)."""
    for fraction, prob, _ in (point for point in GRID if point[2] == target):
        expected = (target * fraction - 1) * (target * prob - 1) / (target - 1)
        assert float(ratio_loss(scalar(fraction), scalar(prob), target)) == pytest.approx(
            expected, rel=1e-12, abs=1e-12
        )


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_zero_where_the_ratio_is_met(target: float) -> None:
    share = scalar(1.0 / target)
    assert abs(float(ratio_loss(share, share, target))) < 1e-12
    assert abs(float(ratio_gradient_scale(share, target))) < 1e-12


def test_the_loss_is_negative_where_fraction_and_probability_straddle_the_target() -> None:
    """It steers and is no distance: clamping it at 0 would switch the controller off here."""
    loss = ratio_loss(scalar(0.2), scalar(0.3), 4.0)
    assert float(loss) == pytest.approx(-0.2 * 0.2 / 3, rel=1e-12)
    assert float(ratio_gradient_scale(scalar(0.2), 4.0)) < 0.0


def test_the_gradient_has_the_values_of_the_design() -> None:
    scale = ratio_gradient_scale(torch.tensor([0.1, 0.25, 0.5], dtype=torch.float64), 4.0)
    expected = torch.tensor([-0.8, 0.0, 4.0 / 3.0], dtype=torch.float64)
    torch.testing.assert_close(scale, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_the_scale_is_the_derivative_of_the_loss(target: float) -> None:
    """Against autograd, at every point of the grid; it does not depend on G."""
    for fraction, prob, _ in (point for point in GRID if point[2] == target):
        mean_prob = scalar(prob).requires_grad_()
        (gradient,) = torch.autograd.grad(
            ratio_loss(scalar(fraction), mean_prob, target), mean_prob
        )
        scale = float(ratio_gradient_scale(scalar(fraction), target))
        assert scale == pytest.approx(float(gradient), rel=1e-12, abs=1e-12)


def test_the_sign_tells_too_many_boundaries_from_too_few() -> None:
    """Positive where R F > 1, so that descent lowers every probability."""
    seen = set()
    for fraction, _, target in GRID:
        sign = float(torch.sign(ratio_gradient_scale(scalar(fraction), target)))
        excess = target * fraction - 1.0
        assert sign == (excess > 0) - (excess < 0)
        seen.add(sign)
    assert seen == {-1.0, 0.0, 1.0}


def test_every_token_gets_the_same_gradient() -> None:
    """Whatever its own probability or decision: dL/dp_t = scale / T."""
    generator = torch.Generator().manual_seed(0)
    prob_T = torch.rand(37, generator=generator, dtype=torch.float64).requires_grad_()
    mask_T = prob_T.detach() > 0.4
    fraction = mask_T.double().mean()
    (gradient,) = torch.autograd.grad(ratio_loss(fraction, prob_T.mean(), 4.0), prob_T)
    assert bool((gradient == gradient[0]).all())
    expected = ratio_gradient_scale(fraction, 4.0) / 37
    torch.testing.assert_close(gradient, expected.expand(37), rtol=1e-12, atol=0)
    assert float(expected) > 0.1 / 37, "more boundaries than wanted"


def test_the_scale_is_a_number_of_its_own_precision_without_a_gradient() -> None:
    """F counts decisions: nothing flows back, and half precision does not round it."""
    fraction = torch.tensor([0.3], requires_grad=True)
    assert not ratio_gradient_scale(fraction, 4.0).requires_grad
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert ratio_gradient_scale(torch.tensor([0.25], dtype=dtype), 4.0).dtype == wide
    per_document = ratio_gradient_scale(torch.tensor([[0.1, 0.25], [0.5, 1.0]]), 4.0)
    assert per_document.shape == (2, 2)
