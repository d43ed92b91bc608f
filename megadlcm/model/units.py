"""A model run unit by unit: the same modules as `forward`, cut where a stage may end.

Which units a model has, and what belongs to each, is in `config.anatomy`.

Letters: T tokens, M concepts, D d_token, C d_concept, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.config.anatomy import Stream, UnitId, UnitKind
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
    # the default of `forward`, so that stages draw what one device draws: by place, a document
    # is segmented alike alone and packed
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


def run_units(model: LanguageModel, units: Sequence[UnitId], flow: Flow) -> None:
    """Runs consecutive units.

    Args:
        model: a model that holds at least these units.
        units: the units, in order.
        flow: the micro-batch; changed.
    """
    # neighbouring blocks run together: they share the rotations
    for kind, members in itertools.groupby(units, key=lambda unit: unit.kind):
        if kind.is_block:
            blocks = [unit.index for unit in members if unit.index is not None]
            _run_blocks(model, kind, blocks, flow)
        else:
            _RUN[kind](model, flow)


def _run_blocks(model: LanguageModel, kind: UnitKind, blocks: list[int], flow: Flow) -> None:
    assert flow.states is not None
    packing = flow.packing
    if kind.stream is Stream.CONCEPTS:
        assert flow.layout is not None
        packing = flow.layout.packing  # concepts have places and documents of their own
    flow.states = getattr(model, kind.label).run(flow.states, packing, flow.backend, blocks)


def _embed(model: LanguageModel, flow: Flow) -> None:
    # from here to the head a process keeps its own rows between layers, where they are sharded
    flow.states = model.seams.split_rows(model.token_embedding(flow.tokens_T))


def _segment(model: LanguageModel, flow: Flow) -> None:
    assert isinstance(model, DLCM) and flow.states is not None
    # whole rows: a segment may begin on one process's rows and end on another's
    flow.hidden_TD = model.encoder.finish(flow.states, flow.packing)
    boundary = model.boundary_detector(flow.hidden_TD, flow.packing, flow.sampling)
    segment(flow, boundary, model.config.segment_align)
    flow.states = model.seams.split_rows(model.concept_pool(flow.hidden_TD, flow.layout))


def _read_concepts(model: LanguageModel, flow: Flow) -> None:
    assert isinstance(model, DLCM) and flow.states is not None and flow.layout is not None
    concept_MC = model.backbone.finish(flow.states, flow.layout.packing)
    fused_TD = model.concept_reader(
        flow.hidden_TD, concept_MC, flow.boundary, flow.packing, flow.layout, flow.backend
    )
    flow.states = model.seams.split_rows(fused_TD)
    flow.hidden_TD = None  # nothing reads it again; kept, it would take memory through the decoder


def _predict(model: LanguageModel, flow: Flow) -> None:
    assert flow.states is not None
    # the head's vocabulary is sharded instead of the rows
    states_TD = model.final_stack.finish(flow.states, flow.packing)
    flow.logits_TV, flow.vocabulary = model.logits(states_TD), model.vocabulary


_RUN: dict[UnitKind, Callable[[LanguageModel, Flow], None]] = {
    UnitKind.TOKEN_EMBEDDING: _embed,
    UnitKind.SEGMENTATION: _segment,
    UnitKind.CONCEPT_READER: _read_concepts,
    UnitKind.LM_HEAD: _predict,
}
