"""Cross-entropy as a sum, so that the caller divides once, by the tokens of the whole step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class VocabularyPart(Protocol):
    """How processes that hold a part of the vocabulary each put their parts together."""

    def vocabulary_start(self, part_size: int) -> int:
        """First token id of this part."""
        ...

    def max_over_vocabulary(self, values: Tensor) -> Tensor:
        """Largest value over the parts, without a gradient."""
        ...

    def sum_over_vocabulary(self, values: Tensor) -> Tensor:
        """Sum over the parts."""
        ...


def token_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, part: VocabularyPart | None = None
) -> Tensor:
    """Negative log-likelihood of each label, in nats, computed in fp32 or wider.

    Every token has a label: torch's own cross-entropy would pass over a label of -100.

    Args:
        logits_TV: (T, V), or of a part of the vocabulary.
        labels_T: int64 (T,), each in [0, V) of the whole vocabulary.
        part: puts the parts of the vocabulary together; None if `logits_TV` has all of it.

    Returns:
        (T,).
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    if part is None:
        # gathered from log-probabilities and not by torch's own loss, which ignores label -100
        log_prob_TV = logits_TV.to(wide).log_softmax(-1)
        return -log_prob_TV.gather(1, labels_T.unsqueeze(1)).squeeze(1)
    return _cross_entropy_of_parts(logits_TV.to(wide), labels_T, part)


def is_own_token(tokens_T: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Finds the tokens of one part of the vocabulary.

    Args:
        tokens_T: token ids, int64 (T,).
        start: first id of the part.
        size: ids in the part.

    Returns:
        Ids counted from the start of the part, 0 for foreign ones, int64 (T,); whether each token
        belongs to the part, bool (T,).
    """
    local_T = tokens_T - start
    own_T = (local_T >= 0) & (local_T < size)
    # a valid id also for foreign tokens: lookups need no mask
    return torch.where(own_T, local_T, torch.zeros_like(local_T)), own_T


def _cross_entropy_of_parts(logits_TV: Tensor, labels_T: Tensor, part: VocabularyPart) -> Tensor:
    """Log sum exp(l - m) - (l_label - m) with m, the sum and l_label put together from parts."""
    size = logits_TV.shape[1]
    # a label lies in one part; the others look up entry 0 and add 0
    local_T, own_T = is_own_token(labels_T, part.vocabulary_start(size), size)
    shifted_TV = logits_TV - part.max_over_vocabulary(logits_TV.detach().amax(1)).unsqueeze(1)
    found_T = shifted_TV.gather(1, local_T.unsqueeze(1)).squeeze(1) * own_T
    # one all-reduce for both sums
    both_2T = part.sum_over_vocabulary(torch.stack([shifted_TV.exp().sum(1), found_T]))
    return both_2T[0].log() - both_2T[1]
