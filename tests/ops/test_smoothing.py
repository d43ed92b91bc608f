"""The moving average over concepts (peers' list 6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megadlcm.ops.packing import Packing, packing_from_offsets
from megadlcm.ops.smoothing import MIN_WEIGHT, exponential_smoothing, linear_recurrence

# chunks of the implementation hold 64 rows: below, at and above one and two of them
LENGTHS = [1, 2, 63, 64, 65, 128, 129, 200]


def loop_smoothing(concept_MC: Tensor, weight_M: Tensor, packing: Packing) -> Tensor:
    """The recurrence, one concept after the other."""
    rows: list[Tensor] = []
    for concept, first in enumerate((packing.position == 0).tolist()):
        weight = weight_M[concept].clamp(MIN_WEIGHT, 1 - MIN_WEIGHT)
        new = concept_MC[concept]
        rows.append(new if first else weight * new + (1 - weight) * rows[-1])
    return torch.stack(rows)


def random_case(num_rows: int, num_documents: int, seed: int) -> tuple[Tensor, Tensor, Packing]:
    """Concepts, weights that reach both ends of [0, 1], and documents."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(num_rows - 1, generator=generator)[: num_documents - 1] + 1
    offsets = torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([num_rows])))
    concept_MC = torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    weight_M = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    weight_M[::5] = 1.0
    weight_M[3::7] = 0.0
    return concept_MC, weight_M, packing_from_offsets(offsets, num_rows)


@pytest.mark.parametrize("num_rows", LENGTHS)
def test_smoothing_equals_the_recurrence(num_rows: int) -> None:
    """Values and both gradients, over one and several documents."""
    for num_documents in (1, min(4, num_rows)):
        concept_MC, weight_M, packing = random_case(num_rows, num_documents, num_rows)
        concept_MC.requires_grad_()
        weight_M.requires_grad_()
        fast = exponential_smoothing(concept_MC, weight_M, packing)
        slow = loop_smoothing(concept_MC, weight_M, packing)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
        upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1)).double()
        inputs = (concept_MC, weight_M)
        fast_gradients = torch.autograd.grad(fast, inputs, upstream)
        slow_gradients = torch.autograd.grad(slow, inputs, upstream, allow_unused=True)
        for fast_gradient, slow_gradient in zip(fast_gradients, slow_gradients, strict=True):
            expected = torch.zeros_like(fast_gradient) if slow_gradient is None else slow_gradient
            torch.testing.assert_close(fast_gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_rows", [5, 65, 140])
def test_a_later_concept_changes_no_earlier_one(num_rows: int) -> None:
    """Peers' list 6: bitwise, for its value and for its weight."""
    concept_MC, weight_M, packing = random_case(num_rows, 3, seed=7)
    before = exponential_smoothing(concept_MC, weight_M, packing)
    for changed in range(1, num_rows, 3):
        other_MC, other_M = concept_MC.clone(), weight_M.clone()
        other_MC[changed] += 10.0
        other_M[changed] = 0.3 - 0.2 * other_M[changed]
        after = exponential_smoothing(other_MC, other_M, packing)
        torch.testing.assert_close(after[:changed], before[:changed], rtol=0, atol=1e-14)
        assert (after[changed] - before[changed]).abs().max() > 1e-5


def test_each_document_starts_anew() -> None:
    """Nothing of the previous document remains, not even 1e-4 of it."""
    concept_MC, weight_M, packing = random_case(150, 6, seed=8)
    whole = exponential_smoothing(concept_MC, weight_M, packing)
    huge_MC = concept_MC.clone()
    huge_MC[: packing.bounds[3]] *= 1e12
    other = exponential_smoothing(huge_MC, weight_M, packing)
    torch.testing.assert_close(
        other[packing.bounds[3] :], whole[packing.bounds[3] :], rtol=1e-12, atol=1e-12
    )
    starts = [bound for bound in packing.bounds[:-1]]
    assert torch.equal(whole[starts], concept_MC[starts])


def test_extreme_weights_give_finite_values_and_gradients() -> None:
    """P = 0 and P = 1 everywhere; the published scan without a clamp returns NaN here."""
    packing = packing_from_offsets(torch.tensor([0, 300]), 300)
    concept_MC = torch.randn(300, 2, generator=torch.Generator().manual_seed(9)).requires_grad_()
    for value in (0.0, 1.0):
        weight_M = torch.full((300,), value, requires_grad=True)
        smooth = exponential_smoothing(concept_MC, weight_M, packing)
        gradients = torch.autograd.grad(smooth.square().sum(), (concept_MC, weight_M))
        assert all(bool(part.isfinite().all()) for part in (smooth, *gradients))
        expected = concept_MC if value == 1.0 else concept_MC[:1].expand(300, -1)
        assert (smooth - expected).abs().max() < 0.2


def test_smoothing_in_fp32_stays_exact_over_long_documents() -> None:
    """Products of 20,000 decays neither under- nor overflow."""
    concept_MC, weight_M, packing = random_case(20_000, 2, seed=10)
    exact = exponential_smoothing(concept_MC, weight_M * 0.01, packing)
    rounded = exponential_smoothing(concept_MC.float(), weight_M.float() * 0.01, packing)
    assert (exact - rounded).abs().max() < 1e-5


def test_the_recurrence_can_be_differentiated() -> None:
    """Gradcheck over two chunks, with a cut in each."""
    generator = torch.Generator().manual_seed(11)
    input_MC = torch.randn(70, 2, generator=generator, dtype=torch.float64).requires_grad_()
    decay_M = 0.2 + 0.6 * torch.rand(70, generator=generator, dtype=torch.float64)
    decay_M[[0, 20, 66]] = 0.0
    inner = decay_M > 0
    free = decay_M[inner].clone().requires_grad_()

    def solve(input_MC: Tensor, free: Tensor) -> Tensor:
        return linear_recurrence(input_MC, decay_M.masked_scatter(inner, free))

    assert torch.autograd.gradcheck(solve, (input_MC, free), fast_mode=True)
