"""Cross-entropy as a sum, so that the caller divides once, by the tokens of the whole step."""

from __future__ import annotations

import torch
from torch import Tensor


def token_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats, computed in fp32 or wider.

    Every token has a label: torch's own cross-entropy would pass over a label of -100.

    Args:
        logits_TV: (T, V).
        labels_T: int64 (T,), each in [0, V).

    Returns:
        (T,).
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    log_prob_TV = logits_TV.to(wide).log_softmax(-1)
    return -log_prob_TV.gather(1, labels_T.unsqueeze(1)).squeeze(1)
