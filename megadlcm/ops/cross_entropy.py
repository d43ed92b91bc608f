"""Cross-entropy as a sum, so that the caller divides once, by the tokens of the whole step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def token_cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats, computed in fp32 or wider.

    Args:
        logits_TV: (T, V).
        labels_T: int64 (T,); -100 marks a token without a label, whose loss is 0.

    Returns:
        (T,).
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(
        logits_TV.to(wide), labels_T, ignore_index=IGNORE_INDEX, reduction="none"
    )
