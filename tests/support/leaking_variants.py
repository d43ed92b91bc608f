"""Models that see the future, for negative controls: made here by patching, never by a config."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout, concept_layout


def literal_layout(mask_T: Tensor, packing: Packing, align: str) -> ConceptLayout:
    """The paper's words taken literally: pool [phi(k), phi(k+1)), see it from phi(k)."""
    layout = concept_layout(mask_T, packing, "end")
    return dataclasses.replace(
        layout,
        pooled_concept_T=layout.visible_concept_T,
        pooled_count_M=layout.run_length_M,
        pool_stop_M=layout.boundary_position_M + layout.run_length_M,
    )


def own_last_token_layout(mask_T: Tensor, packing: Packing, align: str) -> ConceptLayout:
    """Pool [phi(k), phi(k+1)), see it from its own last token, phi(k+1) - 1.

    Each pooled token has been read by then; what leaks is that the next token is a boundary.
    """
    layout = concept_layout(mask_T, packing, "start_shift")
    visible_T = layout.visible_concept_T
    is_last_T = torch.zeros_like(mask_T)
    is_last_T[packing.cu_seqlens[1:].long() - 1] = True
    visible_T = torch.where(is_last_T, visible_T, visible_T.roll(-1))
    run_length_M = torch.bincount(visible_T, minlength=layout.num_concepts)
    return dataclasses.replace(layout, visible_concept_T=visible_T, run_length_M=run_length_M)


def symmetric_smoothing(concept_MC: Tensor, weight_M: Tensor, packing: Packing) -> Tensor:
    """Averages each concept with the next one of its document."""
    has_next_M1 = (packing.position.roll(-1) > 0).unsqueeze(1)
    return torch.where(has_next_M1, (concept_MC + concept_MC.roll(-1, 0)) / 2, concept_MC)


def use_literal_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model leak through the pooled tokens."""
    monkeypatch.setattr("megadlcm.model.dlcm.concept_layout", literal_layout)


def use_own_last_token_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model with `start_shift` leak through the decision alone."""
    monkeypatch.setattr("megadlcm.model.dlcm.concept_layout", own_last_token_layout)


def use_symmetric_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every model with smoothing leak through the next concept."""
    monkeypatch.setattr("megadlcm.model.chunking.exponential_smoothing", symmetric_smoothing)
