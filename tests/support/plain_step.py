"""The loss of a step from the specification's equations, over the plain model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.plain_model import PlainModel


def plain_loss(
    plain: PlainModel,
    documents: Sequence[Tensor],
    labels: Sequence[Tensor],
    drawn: Sequence[list[bool]],
    ratio_loss_weight: float,
) -> Tensor:
    """Mean cross-entropy over the tokens of the step plus lambda times the ratio loss.

    L_ratio = R / (R - 1) [(R - 1) F G + (1 - F) (1 - G)] (DLCM Eq. 8-10), F the share of drawn
    boundaries, a constant, and G the mean of p: over all tokens of the step, or of each document
    with as much weight as it has tokens.
    """
    config = plain.config
    ratio = config.target_tokens_per_concept
    num_tokens = sum(len(document) for document in documents)
    parts = [plain.forward(*pair) for pair in zip(documents, drawn, strict=True)]
    loss = torch.zeros((), dtype=torch.float64)
    for (logits_TV, _), labels_T in zip(parts, labels, strict=True):
        for row, label in zip(logits_TV, labels_T, strict=True):
            loss = loss + row.logsumexp(0) - row[label]
    loss = loss / num_tokens

    def ratio_loss(indices: Sequence[int]) -> Tensor:
        decisions = [decision for index in indices for decision in drawn[index]]
        probs = torch.cat([prob for index in indices if (prob := parts[index][1]) is not None])
        fraction, mean = sum(decisions) / len(decisions), probs.mean()
        drive = (ratio - 1) * fraction * mean + (1 - fraction) * (1 - mean)
        return ratio / (ratio - 1) * drive

    everywhere = range(len(documents))
    if config.boundary_mode in ("learned_global", "ema_ste"):
        loss = loss + ratio_loss_weight * ratio_loss(everywhere)
    if config.boundary_mode == "learned_local":
        for index in everywhere:
            share = len(documents[index]) / num_tokens
            loss = loss + ratio_loss_weight * share * ratio_loss([index])
    return loss
