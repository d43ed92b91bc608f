"""A model run piece by piece: the same modules as `forward`, cut where a stage may end.

Units, in the order of the computation: `token_embedding`, `encoder.0`, ..., `segmentation` (the
encoder's norm, boundary detector, concept pool), `backbone.0`, ..., `concept_reader` (the
backbone's norm and the reader), `decoder.0`, ..., `lm_head` (the decoder's norm and the head). The
dense control has `token_embedding`, `decoder.0`, ..., `lm_head`.

Letters: T tokens, M concepts, D d_token, C d_concept, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.model.dlcm import DLCM
from megadlcm.model.language_model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.cross_entropy import VocabularyPart
from megadlcm.ops.packing import Packing, packing_from_offsets
from megadlcm.ops.segments import ConceptLayout, concept_layout


@dataclass(frozen=True)
class MicroBatch:
    """What a model reads in one pass, on the device."""

    tokens_T: Tensor
    """Token ids, int64 (T,)."""
    cu_seqlens: Tensor
    """Offsets of the documents, int32 (S+1,)."""
    sampling: BoundarySampling | None = None
    """Names the random draws of training mode; see DLCM.forward."""


@dataclass
class Flow:
    """One micro-batch on its way through the units; each unit takes and leaves what it needs."""

    tokens_T: Tensor
    """Token ids, int64 (T,)."""
    packing: Packing
    """The documents."""
    sampling: BoundarySampling
    """Names the random draws."""
    backend: str
    """Attention back-end."""
    states: Tensor | None = None
    """Rows of tokens (T, D) or concepts (M, C) that this process keeps."""
    hidden_TD: Tensor | None = None
    """Output of the encoder, which the concept reader needs again."""
    boundary: BoundaryOutput | None = None
    """Scores and decisions, from the segmentation on."""
    layout: ConceptLayout | None = None
    """The concepts, from the segmentation on."""
    logits_TV: Tensor | None = None
    """Logits, after the head."""
    vocabulary: VocabularyPart | None = None
    """Puts parts of the vocabulary together; None if the logits have all of it."""

    @property
    def output(self) -> ModelOutput:
        """What `forward` would have returned; after the head."""
        assert self.logits_TV is not None
        return ModelOutput(
            self.logits_TV,
            self.packing,
            self.boundary,
            self.layout,
            self.vocabulary,
        )


def start_flow(model: LanguageModel, batch: MicroBatch) -> Flow:
    """Describes a micro-batch before its first unit."""
    packing = packing_from_offsets(batch.cu_seqlens, batch.tokens_T.numel())
    sampling = batch.sampling or BoundarySampling(seed=0, step=0, token_index_T=packing.position)
    return Flow(batch.tokens_T, packing, sampling, model.backend())


def run_each(
    model: LanguageModel, batches: Sequence[MicroBatch], consume: Callable[[int, ModelOutput], None]
) -> None:
    """Runs a whole model on one micro-batch after the other, without a gradient."""
    with torch.no_grad():
        for index, batch in enumerate(batches):
            consume(index, model(batch.tokens_T, batch.cu_seqlens, batch.sampling))


def segment(flow: Flow, boundary: BoundaryOutput, align: str) -> None:
    """Takes boundary decisions, own ones or those of an earlier stage, and lays out concepts."""
    flow.boundary = boundary
    flow.layout = concept_layout(boundary.mask_T, flow.packing, align)


def run_units(model: LanguageModel, names: Sequence[str], flow: Flow) -> None:
    """Runs consecutive units.

    Args:
        model: a model that holds at least these units.
        names: the units, in order.
        flow: the micro-batch; changed.
    """
    for kind, members in itertools.groupby(names, key=lambda name: name.partition(".")[0]):
        blocks = [int(name.partition(".")[2]) for name in members if "." in name]
        if blocks:
            _run_blocks(model, kind, blocks, flow)
        else:
            _run_unit(model, kind, flow)


def _run_blocks(model: LanguageModel, kind: str, blocks: list[int], flow: Flow) -> None:
    assert flow.states is not None
    packing = flow.packing
    if kind == "backbone":
        assert flow.layout is not None
        packing = flow.layout.packing
    flow.states = getattr(model, kind).run(flow.states, packing, flow.backend, blocks)


def _run_unit(model: LanguageModel, name: str, flow: Flow) -> None:
    seams = model.seams
    if name == "token_embedding":
        flow.states = seams.split_rows(model.token_embedding(flow.tokens_T))
    elif name == "segmentation":
        assert isinstance(model, DLCM) and flow.states is not None
        flow.hidden_TD = model.encoder.finish(flow.states, flow.packing)
        boundary = model.boundary_detector(flow.hidden_TD, flow.packing, flow.sampling)
        segment(flow, boundary, model.config.segment_align)
        flow.states = seams.split_rows(model.concept_pool(flow.hidden_TD, flow.layout))
    elif name == "concept_reader":
        assert isinstance(model, DLCM) and flow.states is not None and flow.layout is not None
        concept_MC = model.backbone.finish(flow.states, flow.layout.packing)
        fused_TD = model.concept_reader(
            flow.hidden_TD, concept_MC, flow.boundary, flow.packing, flow.layout, flow.backend
        )
        flow.states = seams.split_rows(fused_TD)
        flow.hidden_TD = None
    else:
        assert name == "lm_head" and flow.states is not None
        states_TD = model.final_stack.finish(flow.states, flow.packing)
        flow.logits_TV, flow.vocabulary = model.logits(states_TD), model.vocabulary
