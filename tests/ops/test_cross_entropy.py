"""Token losses."""

from __future__ import annotations

import math

import pytest
import torch

from megadlcm.ops.cross_entropy import token_cross_entropy


def test_losses_are_negative_log_likelihoods_in_nats() -> None:
    """Against log-softmax in fp64."""
    logits_TV = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    labels_T = torch.tensor([0, 10, 3, 3, 7, 1])
    expected = -logits_TV.double().log_softmax(-1)[torch.arange(6), labels_T]
    torch.testing.assert_close(token_cross_entropy(logits_TV, labels_T).double(), expected)
    uniform = token_cross_entropy(torch.zeros(1, 11), labels_T[:1])
    assert math.isclose(float(uniform), math.log(11), rel_tol=1e-6)


def test_gradients_are_probabilities_less_the_label() -> None:
    """softmax - onehot, scaled by what the caller divides by."""
    generator = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(6, 11, generator=generator, dtype=torch.float64).requires_grad_()
    labels_T = torch.tensor([0, 10, 3, 3, 7, 1])
    weight_T = torch.rand(6, generator=generator, dtype=torch.float64)
    (token_cross_entropy(logits_TV, labels_T) * weight_T).sum().backward()
    expected = logits_TV.detach().softmax(-1) - torch.eye(11, dtype=torch.float64)[labels_T]
    assert (logits_TV.grad - expected * weight_T.unsqueeze(1)).abs().max() < 1e-15


@pytest.mark.parametrize("label", [-100, -1, 5, 1000])
def test_a_label_outside_of_the_vocabulary_is_an_error(label: int) -> None:
    """Also -100, which torch passes over: the objective counts every token of a batch."""
    labels_T = torch.tensor([1, label, 2])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        token_cross_entropy(torch.zeros(3, 5), labels_T)


def test_half_precision_logits_are_widened_first() -> None:
    """bf16 cannot tell losses apart that fp32 can."""
    logits_TV = torch.randn(3, 500, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss_T = token_cross_entropy(logits_TV, torch.tensor([4, 5, 6]))
    assert loss_T.dtype == torch.float32
    expected = token_cross_entropy(logits_TV.double(), torch.tensor([4, 5, 6]))
    torch.testing.assert_close(loss_T.double(), expected, rtol=1e-5, atol=1e-5)
