"""Token losses."""

from __future__ import annotations

import math

import torch

from megadlcm.ops.cross_entropy import IGNORE_INDEX, token_cross_entropy


def test_losses_are_negative_log_likelihoods_in_nats() -> None:
    """Against log-softmax in fp64."""
    logits_TV = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    labels_T = torch.tensor([0, 10, 3, 3, 7, 1])
    expected = -logits_TV.double().log_softmax(-1)[torch.arange(6), labels_T]
    torch.testing.assert_close(token_cross_entropy(logits_TV, labels_T).double(), expected)
    uniform = token_cross_entropy(torch.zeros(1, 11), labels_T[:1])
    assert math.isclose(float(uniform), math.log(11), rel_tol=1e-6)


def test_tokens_without_a_label_lose_nothing_and_get_no_gradient() -> None:
    """The sum over a pack is then the sum over its labelled tokens."""
    logits_TV = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss_T = token_cross_entropy(logits_TV, torch.tensor([1, IGNORE_INDEX, 2, IGNORE_INDEX]))
    assert loss_T[1] == loss_T[3] == 0
    loss_T.sum().backward()
    assert not logits_TV.grad[[1, 3]].any()
    assert logits_TV.grad[[0, 2]].any()


def test_half_precision_logits_are_widened_first() -> None:
    """bf16 cannot tell losses apart that fp32 can."""
    logits_TV = torch.randn(3, 500, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss_T = token_cross_entropy(logits_TV, torch.tensor([4, 5, 6]))
    assert loss_T.dtype == torch.float32
    expected = token_cross_entropy(logits_TV.double(), torch.tensor([4, 5, 6]))
    torch.testing.assert_close(loss_T.double(), expected, rtol=1e-5, atol=1e-5)
