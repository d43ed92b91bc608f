"""The model is the architecture of the specification, not only one that agrees with itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.config import MupConfig
from megadlcm.config.constants import SMOOTHING_CHUNK
from megadlcm.model import LanguageModel, build_model
from megadlcm.ops.boundary import BoundarySampling
from tests.support.plain_model import BASE_WIDTH, PlainModel
from tests.support.tiny_models import (
    ALIGNS,
    WEIGHTINGS,
    neighbour_cosines,
    pack,
    perturb_gains,
    position_in_document,
    random_documents,
    tiny_config,
    tiny_model,
    variant_name,
)

# no two widths are equal: no misplaced matrix fits, and the logits are scaled by 1 / 1.5
SIZES: dict[str, Any] = {"d_token": 24, "d_concept": 36, "token_ffn_size": 20}
LENGTHS = (9, 1, 14)
TOLERANCE = 1e-10
OPTIONS: list[dict[str, Any]] = [
    {"segment_align": align, "concept_weighting": weighting}
    for align in ALIGNS
    for weighting in WEIGHTINGS
] + [
    {"smoothing": "none"},
    {"cross_attention_rope": False},
    {"self_attention_qk_norm": True, "target_tokens_per_concept": 2.0},
    {"boundary_size": 7},
    {"boundary_mode": "ema_ste"},
    {"boundary_mode": "learned_local"},
    {"boundary_mode": "rule"},
    {"boundary_mode": "rule", "segment_align": "start_shift"},
    {"boundary_mode": "fixed"},
    {"boundary_mode": "fixed", "target_tokens_per_concept": 2.5, "segment_align": "start_shift"},
    {"token_kv_heads": 4, "concept_kv_heads": 1},
    {"rope_theta": 50.0, "norm_eps": 0.1},
]


def relative_errors(
    model: LanguageModel, plain: PlainModel, seed: int = 51, lengths: Sequence[int] = LENGTHS
) -> tuple[dict[str, float], Tensor | None]:
    """Largest difference of logits, p and each parameter's gradient, relative to the largest."""
    documents = random_documents(lengths, seed=seed)
    tokens_T, cu_seqlens = pack(documents)
    sampling = BoundarySampling(3, 5, torch.arange(tokens_T.numel()))
    output = model(tokens_T, cu_seqlens, sampling)
    masks = None if output.boundary_mask_T is None else output.boundary_mask_T.split(lengths)
    drawn = [mask_T.tolist() if masks and model.training else None for mask_T in masks or lengths]
    parts = [plain.forward(*pair) for pair in zip(documents, drawn, strict=True)]
    pairs = {"logits": (output.logits_TV, torch.cat([logits for logits, _ in parts]))}
    if output.boundary_prob_T is not None:
        probs = [prob_T for _, prob_T in parts if prob_T is not None]
        pairs["p"] = (output.boundary_prob_T, torch.cat(probs))
    generator = torch.Generator().manual_seed(seed)
    upstream = {
        name: torch.randn(pair[0].shape, generator=generator, dtype=torch.float64)
        for name, pair in pairs.items()
    }
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = []
    for side in (0, 1):
        loss = sum((pair[side] * upstream[name]).sum() for name, pair in pairs.items())
        gradients.append(torch.autograd.grad(loss, weights))
    pairs |= dict(zip(names, zip(*gradients, strict=True), strict=True))
    with torch.no_grad():
        errors = {
            name: float((actual - expected).abs().max() / expected.abs().max())
            for name, (actual, expected) in pairs.items()
        }
    return errors, output.boundary_mask_T


def reference_case(**options: Any) -> LanguageModel:
    return tiny_model(seed=4, **(SIZES | options))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=variant_name)
def test_the_model_is_the_plain_model(options: dict[str, Any], training: bool) -> None:
    """Logits, p and the gradient of every parameter in fp64, in each document of a pack."""
    model = reference_case(training=training, **options)
    errors, mask_T = relative_errors(model, PlainModel(model))
    assert len(errors) == 2 + len(list(model.parameters()))
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
    assert len(LENGTHS) + 3 < int(mask_T.sum()) < sum(LENGTHS) - 3
    # and some decision was another one than the threshold's
    if training and model.config.boundary.is_sampled:
        decided_T = model.eval()(*pack(random_documents(LENGTHS, seed=51))).boundary_mask_T
        assert not torch.equal(mask_T, decided_T)


@pytest.mark.parametrize("mode", ["learned_global", "ema_ste"])
def test_a_document_of_more_concepts_than_a_chunk_is_the_plain_model(mode: str) -> None:
    """The recurrence of the smoothing carries over its chunks of 64."""
    shallow = dict.fromkeys(("encoder_layers", "backbone_layers", "decoder_layers"), 1)
    options = shallow | {"boundary_mode": mode, "target_tokens_per_concept": 1.3}
    model = reference_case(training=True, **options)
    errors, mask_T = relative_errors(model, PlainModel(model), lengths=(3, 90))
    assert SMOOTHING_CHUNK == 64 < int(mask_T[3:].sum()) < 85
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


class Unclamped(PlainModel):
    def smooth(self, concepts: list[Tensor], probs: list[Tensor]) -> list[Tensor]:
        smoothed = concepts[:1]
        for concept, prob in zip(concepts[1:], probs[1:], strict=True):
            smoothed.append(prob * concept + (1 - prob) * smoothed[-1])
        return smoothed


@pytest.mark.parametrize("mode", ["learned_global", "ema_ste", "rule"])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_clamps_of_the_smoothing_are_those_of_the_plain_model(end: float, mode: str) -> None:
    """Every token is a boundary, and for about half of them p is 0, or 1."""
    model = reference_case(boundary_mode=mode)
    detector = model.boundary_detector
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=51))
    middle = neighbour_cosines(model, tokens_T, cu_seqlens).median()
    detector.offset.fill_(float(middle) + (1.0 if end else -1.0))
    detector.threshold.zero_()
    errors, mask_T = relative_errors(model, PlainModel(model))
    prob_T = model.boundaries(tokens_T, cu_seqlens).prob_T
    inner_T = prob_T[position_in_document(cu_seqlens) > 0]
    assert mask_T.all() and 8 < int((inner_T == end).sum()) < len(inner_T) - 8
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}
    # the control: without them the last bits would be others
    assert relative_errors(model, Unclamped(model))[0]["logits"] > 1e-7


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_dense_control_is_the_plain_transformer(qk_norm: bool) -> None:
    config = tiny_config(
        architecture="dense", self_attention_qk_norm=qk_norm, **(SIZES | {"backbone_layers": 1})
    )
    model = build_model(config, MupConfig(base_width=BASE_WIDTH, init_std=0.3), seed=5).double()
    perturb_gains(model, seed=5)
    errors, _ = relative_errors(model, PlainModel(model))
    assert len(errors) == 1 + len(list(model.parameters()))
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


class RotatedBeforeNorm(PlainModel):
    def placed(self, name: str, head: Tensor, place: int) -> Tensor:
        return self.norm(f"concept_reader.{name}_norm", self.turn(head, place))


class NormedValue(PlainModel):
    def value(self, head: Tensor) -> Tensor:
        return head / head.square().mean().sqrt()


class RawPreviousConcept(PlainModel):
    """z~_k from z_(k-1) and not from z~_(k-1)."""

    def smooth(self, concepts: list[Tensor], probs: list[Tensor]) -> list[Tensor]:
        pairs = zip(probs[1:], concepts[1:], concepts, strict=False)
        return concepts[:1] + [p * now + (1 - p) * before for p, now, before in pairs]


class InterleavedPairs(PlainModel):
    """Rotates the pair (2i, 2i + 1)."""

    def turn(self, head: Tensor, place: int) -> Tensor:
        order = torch.arange(len(head)).view(-1, 2).T.flatten()
        return super().turn(head[order], place)[order.argsort()]


class UnscaledLogits(PlainModel):
    def logits(self, row: Tensor) -> Tensor:
        return self.matrix("lm_head", row)


class UnscaledScores(PlainModel):
    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return super().attend(query * math.sqrt(len(query)), keys, values)


class NoResidual(PlainModel):
    def fuse(self, row: Tensor, read: Tensor, prob: Tensor, is_boundary: bool) -> Tensor:
        return read


class SummedSegment(PlainModel):
    """Sums the tokens of a segment."""

    def concept(self, rows: list[Tensor]) -> Tensor:
        return super().concept([row * len(rows) for row in rows])


class SwappedCosine(PlainModel):
    """W_k h_(t-1) against W_q h_t."""

    def matrix(self, name: str, vector: Tensor) -> Tensor:
        swapped = {"boundary_detector.w_q": "w_k", "boundary_detector.w_k": "w_q"}
        if name in swapped:
            name = f"boundary_detector.{swapped[name]}"
        return super().matrix(name, vector)


@pytest.mark.parametrize(
    "other",
    [
        RotatedBeforeNorm,
        NormedValue,
        RawPreviousConcept,
        InterleavedPairs,
        UnscaledLogits,
        UnscaledScores,
        NoResidual,
        SummedSegment,
        SwappedCosine,
    ],
)
def test_the_comparison_tells_other_architectures_apart(other: type[PlainModel]) -> None:
    """Each control is a plausible misreading; the boundaries are given, so that only it differs."""
    model = reference_case(training=True)
    errors, _ = relative_errors(model, other(model))
    assert max(errors["logits"], errors["p"]) > 1e-3
