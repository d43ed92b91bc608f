"""Token-by-token decoding with caches: the same function as the parallel forward.

The backbone runs only when a boundary closes a segment, so most steps cost the token stacks
alone. One state belongs to one document.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadlcm.model.boundary_detector import DetectorState
from megadlcm.model.chunking import PoolState, ReaderState
from megadlcm.model.dlcm import DLCM
from megadlcm.model.transformer import StackCache


@dataclass
class DecodeState:
    """Everything that decoding one document carries from token to token."""

    encoder: StackCache = field(default_factory=StackCache)
    detector: DetectorState = field(default_factory=DetectorState)
    pool: PoolState = field(default_factory=PoolState)
    backbone: StackCache = field(default_factory=StackCache)
    reader: ReaderState = field(default_factory=ReaderState)
    decoder: StackCache = field(default_factory=StackCache)

    @property
    def num_concepts(self) -> int:
        """Concepts so far; the backbone ran once for each."""
        return self.backbone.length


@torch.no_grad()
def decode_step(model: DLCM, state: DecodeState, token: int) -> Tensor:
    """Reads one token and returns the logits of the next one; boundaries are thresholded.

    Args:
        model: the model, in evaluation mode.
        state: the document so far; updated in place.
        token: id of the token that is read.

    Returns:
        Logits (V,).
    """
    device = model.token_embedding.weight.device
    embedded_1D = model.token_embedding(torch.tensor([token], device=device))
    hidden_1D = model.encoder.step(embedded_1D, state.encoder)
    prob, is_boundary = model.boundary_detector.step(hidden_1D, state.detector)
    concept_1C = model.concept_pool.step(hidden_1D, is_boundary, state.pool)
    if concept_1C is not None:
        concept_1C = model.backbone.step(concept_1C, state.backbone)
        model.concept_reader.add_concept(concept_1C, prob, state.reader)
    # after the concept: a boundary token sees what it completed, as in `concept_layout`
    fused_1D = model.concept_reader.step(hidden_1D, state.reader)
    return model.logits(model.decoder.step(fused_1D, state.decoder))[0]
