"""Three probes for information from the future: gradients, replaced tokens, cut documents.

Each returns how large the leak is; a causal model gives rounding noise. Many probes share one
packed batch, whose isolation has tests of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.model import DLCM
from tests.support.tiny_models import VOCAB_SIZE, pack

NUM_ALTERNATIVES = 6


@dataclass(frozen=True)
class Leak:
    """What a probe saw."""

    size: float
    """Largest influence of a later token on an earlier position."""
    flipped_share: float = 0.0
    """Share of the replaced tokens that changed some boundary."""
    boundaries_changed: bool = False
    """Whether a decision before the replaced token changed."""


def gradient_leak(model: DLCM, tokens_T: Tensor) -> Leak:
    """Largest gradient of the logits at t with respect to the embedding of a token after t."""
    length = tokens_T.numel()
    batch_T, cu_seqlens = pack([tokens_T] * length)
    embedded: list[Tensor] = []
    hook = model.token_embedding.register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output)
    )
    try:
        logits = model(batch_T, cu_seqlens).logits_TV.view(length, length, -1)
    finally:
        hook.remove()
    weights = torch.randn(
        logits.shape[-1], generator=torch.Generator().manual_seed(3), dtype=logits.dtype
    )
    # copy t of the document contributes its logits at t alone
    chosen = logits.diagonal(dim1=0, dim2=1).mT @ weights
    (gradient,) = torch.autograd.grad(chosen.sum(), embedded[0])
    influence = gradient.view(length, length, -1).abs().amax(-1)
    assert influence.tril().max() > 1e-6, "the probe must see the past"
    return Leak(float(influence.triu(1).max()))


@torch.no_grad()
def replacement_leak(model: DLCM, tokens_T: Tensor) -> Leak:
    """Largest change of the logits before a token that is replaced by six others in turn."""
    length = tokens_T.numel()
    documents, positions = [tokens_T], []
    for position in range(1, length):
        for alternative in range(NUM_ALTERNATIVES):
            changed_T = tokens_T.clone()
            step = 1 + alternative * (VOCAB_SIZE - 1) // NUM_ALTERNATIVES
            changed_T[position] = (tokens_T[position] + step) % VOCAB_SIZE
            documents.append(changed_T)
            positions.append(position)
    output = model(*pack(documents))
    logits = output.logits_TV.view(len(documents), length, -1)
    mask = output.boundary_mask_T.view(len(documents), length)
    before = torch.arange(length) < torch.tensor(positions).unsqueeze(1)
    change = (logits[1:] - logits[:1]).abs().amax(-1)
    flipped = mask[1:] != mask[:1]
    return Leak(
        float(change.masked_fill(~before, 0.0).max()),
        float(flipped.any(1).double().mean()),
        bool((flipped & before).any()),
    )


@torch.no_grad()
def truncation_leak(model: DLCM, tokens_T: Tensor) -> Leak:
    """Largest difference between the last logits of a prefix and the same logits of the whole."""
    length = tokens_T.numel()
    whole = model(tokens_T, torch.tensor([0, length], dtype=torch.int32)).logits_TV
    batch_T, cu_seqlens = pack([tokens_T[:stop] for stop in range(1, length + 1)])
    last = model(batch_T, cu_seqlens).logits_TV[cu_seqlens[1:].long() - 1]
    return Leak(float((last - whole).abs().max()))


def all_leaks(model: DLCM, tokens_T: Tensor) -> dict[str, float]:
    """Sizes of the three leaks."""
    return {
        "gradient": gradient_leak(model, tokens_T).size,
        "replacement": replacement_leak(model, tokens_T).size,
        "truncation": truncation_leak(model, tokens_T).size,
    }
