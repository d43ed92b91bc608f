"""The model is the architecture of the specification, not only one that agrees with itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.config import MupConfig
from megadlcm.model import LanguageModel, build_model
from megadlcm.ops.boundary import BoundarySampling
from tests.support.plain_model import BASE_WIDTH, PlainModel
from tests.support.tiny_models import (
    ALIGNS,
    WEIGHTINGS,
    pack,
    perturb_gains,
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
    {"token_kv_heads": 4, "concept_kv_heads": 1},
    {"rope_theta": 50.0, "norm_eps": 0.1},
]


def relative_errors(
    model: LanguageModel, plain: PlainModel, seed: int = 51
) -> tuple[dict[str, float], Tensor | None]:
    """Largest difference of logits, p and each parameter's gradient, relative to the largest."""
    documents = random_documents(LENGTHS, seed=seed)
    tokens_T, cu_seqlens = pack(documents)
    sampling = BoundarySampling(3, 5, torch.arange(tokens_T.numel()))
    output = model(tokens_T, cu_seqlens, sampling)
    masks = None if output.boundary_mask_T is None else output.boundary_mask_T.split(LENGTHS)
    drawn = [mask_T.tolist() if masks and model.training else None for mask_T in masks or LENGTHS]
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
    if training:  # and some decision was another one than the threshold's
        decided_T = model.eval()(*pack(random_documents(LENGTHS, seed=51))).boundary_mask_T
        assert not torch.equal(mask_T, decided_T)


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
