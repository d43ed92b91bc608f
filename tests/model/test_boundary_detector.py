"""Who trains the boundary detector, what it computes in half precision and how it starts."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer import load_tokenizer
from megadlcm.config import MupConfig, load_config
from megadlcm.model import DLCM, build_model
from megadlcm.model.output import ModelOutput
from megadlcm.ops.boundary import (
    BoundarySampling,
    neighbour_cosine,
)
from megadlcm.ops.compression import ratio_gradient_scale
from megadlcm.ops.cross_entropy import token_cross_entropy
from megadlcm.ops.packing import packing_from_offsets
from tests.support.paths import ROOT
from tests.support.tiny_models import (
    ALIGNS,
    BOUNDARY_MODES,
    neighbour_cosines,
    pack,
    position_in_document,
    random_documents,
    similar_states,
    tiny_config,
    tiny_model,
)

LEARNED = ("learned_global", "learned_local")
LENGTHS = (30, 1, 25, 40)
SHIPPED = sorted((ROOT / "configs").glob("dlcm_*.yaml"))
# what boundaries do not depend on
SMALL_REST: dict[str, Any] = {
    "backbone_layers": 1,
    "d_concept": 64,
    "concept_heads": 1,
    "concept_kv_heads": 1,
    "concept_ffn_size": 64,
}
DATA = ROOT.parent / "shared" / "data"


def losses(model: DLCM) -> tuple[Tensor, Tensor, ModelOutput]:
    """Cross-entropy and ratio term of one batch."""
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=31))
    output = model(tokens_T, cu_seqlens)
    loss = token_cross_entropy(output.logits_TV, tokens_T.roll(-1)).mean()
    prob_T, mask_T = output.boundary.prob_T, output.boundary.mask_T
    # not the ratio of the model: the draw could meet that one and leave no gradient
    ratio = ratio_gradient_scale(mask_T.double().mean(), 9.0) * prob_T.mean()
    return loss, ratio, output


def gradient_sizes(model: DLCM, loss: Tensor) -> dict[str, float]:
    """Largest entry of each parameter's gradient; 0 where nothing reached it."""
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {
        name: 0.0 if gradient is None else float(gradient.abs().max())
        for name, gradient in zip(names, gradients, strict=True)
    }


def of_detector(sizes: dict[str, float]) -> list[float]:
    return [size for name, size in sizes.items() if name.startswith("boundary_detector")]


@pytest.mark.parametrize("smoothing", ["ema", "none"])
@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("mode", LEARNED)
def test_only_the_ratio_loss_trains_the_detector(mode: str, align: str, smoothing: str) -> None:
    """Peers' list 32: cross-entropy does not reach p at all, also not through smoothing."""
    options: dict[str, Any] = {"segment_align": align, "smoothing": smoothing}
    model = tiny_model(training=True, boundary_mode=mode, **options)
    loss, ratio, output = losses(model)
    (through_p,) = torch.autograd.grad(
        loss, output.boundary.prob_T, retain_graph=True, allow_unused=True
    )
    assert through_p is None
    by_loss, by_ratio = gradient_sizes(model, loss), gradient_sizes(model, ratio)
    assert of_detector(by_loss) == [0.0, 0.0]
    assert min(of_detector(by_ratio)) > 1e-4
    # the rest of the model: cross-entropy trains all of it, the ratio loss the encoder below
    assert all(size for name, size in by_loss.items() if "boundary_detector" not in name)
    touched = {name.split(".")[0] for name, size in by_ratio.items() if size}
    assert touched == {"token_embedding", "encoder", "boundary_detector"}


@pytest.mark.parametrize("smoothing", ["ema", "none"])
def test_straight_through_lets_cross_entropy_reach_the_detector(smoothing: str) -> None:
    """Peers' list 32: the control of the test above."""
    model = tiny_model(training=True, boundary_mode="ema_ste", smoothing=smoothing)
    loss, _, output = losses(model)
    (through_p,) = torch.autograd.grad(loss, output.boundary.prob_T, retain_graph=True)
    assert (through_p != 0).double().mean() > 0.5
    assert min(of_detector(gradient_sizes(model, loss))) > 1e-6


def test_live_smoothing_adds_to_the_gradient_of_the_straight_through_mode() -> None:
    """Weights of the average carry a gradient of their own, at inner boundaries only."""
    model = tiny_model(training=True, boundary_mode="ema_ste")
    _, _, output = losses(model)
    generator = torch.Generator().manual_seed(1)
    concept_MC = torch.randn(output.layout.num_concepts, 24, generator=generator).double()
    smooth_MC = model.concept_reader.smooth(concept_MC, output.boundary.prob_T, output.layout)
    upstream_MC = torch.randn(smooth_MC.shape, generator=generator).double()
    (gradient_T,) = torch.autograd.grad(
        smooth_MC, output.boundary.prob_T, upstream_MC, allow_unused=True
    )
    inner_T = output.boundary.mask_T & (output.packing.position > 0)
    assert torch.equal(gradient_T != 0, inner_T)


@pytest.mark.parametrize("mode", LEARNED)
def test_a_detached_ratio_loss_stops_at_the_encoder(mode: str) -> None:
    """Peers' list 32: it trains W_q and W_k only, and the encoder's gradient is that of the CE."""
    model = tiny_model(training=True, boundary_mode=mode, ratio_loss_detach_hidden=True)
    loss, ratio, _ = losses(model)
    by_ratio = gradient_sizes(model, ratio)
    assert min(of_detector(by_ratio)) > 1e-4
    assert {name.split(".")[0] for name, size in by_ratio.items() if size} == {"boundary_detector"}
    assert gradient_sizes(model, loss)["encoder.blocks.0.attention.wq.weight"] > 0


def test_a_detached_ratio_loss_changes_no_value() -> None:
    outputs = []
    for detach in (False, True):
        model = tiny_model(training=True, ratio_loss_detach_hidden=detach)
        outputs.append(losses(model)[2])
    assert torch.equal(outputs[0].boundary.prob_T, outputs[1].boundary.prob_T)
    assert torch.equal(outputs[0].logits_TV, outputs[1].logits_TV)


@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_evaluation_draws_nothing(mode: str) -> None:
    """Peers' list 34: two runs are bit-equal whatever names the draws; torch's state is kept."""
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=32))
    model = tiny_model(boundary_mode=mode, sharpening=2.0)
    index_T = torch.arange(tokens_T.numel())
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = (
            model(tokens_T, cu_seqlens, BoundarySampling(seed, 5 * seed, index_T + seed))
            for seed in (0, 1)
        )
        model.train()
        steps = [
            model(tokens_T, cu_seqlens, BoundarySampling(0, step, index_T)) for step in (0, 0, 1)
        ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.logits_TV, again.logits_TV)
    assert torch.equal(first.boundary.mask_T, again.boundary.mask_T)
    assert torch.equal(first.boundary.mask_T, first.boundary.threshold_mask_T)
    masks = [output.boundary.mask_T for output in steps]
    assert torch.equal(masks[0], masks[1])
    drawn = mode not in ("rule", "fixed")
    assert torch.equal(masks[0], masks[2]) != drawn
    assert all(torch.equal(step.boundary.prob_T, first.boundary.prob_T) for step in steps)


@pytest.mark.parametrize("setting", ["bf16 weights", "autocast"])
def test_boundaries_are_decided_in_fp32_in_half_precision(setting: str) -> None:
    """Peers' list 36: against fp64 on the same states; bf16 arithmetic flips far more."""
    num_tokens, size = 40_000, 32
    detector = build_model(tiny_config(d_token=size)).boundary_detector.eval()
    hidden_TD = similar_states(num_tokens, size, common=2.0).bfloat16()
    with torch.no_grad():
        for weight in detector.parameters():
            weight.add_(0.05 * torch.randn(size, size, generator=torch.Generator().manual_seed(34)))
        cosine_T = detector.cosine(hidden_TD)
    detector.calibrate(cosine_T[1:])
    if setting == "bf16 weights":
        detector.to(torch.bfloat16)
    assert detector.offset.dtype == detector.threshold.dtype == torch.float32
    packing = packing_from_offsets(torch.tensor([0, num_tokens]), num_tokens)
    sampling = BoundarySampling(0, 0, packing.position)
    half = torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast")
    with half, torch.no_grad():
        output = detector(hidden_TD, packing, sampling)
        own_cosine_T = detector.cosine(hidden_TD)
        query_TD, key_TD = (
            hidden_TD @ projection.weight.bfloat16().T
            for projection in (detector.w_q, detector.w_k)
        )
        unit = (torch.nn.functional.normalize(part, dim=-1) for part in (query_TD, key_TD))
        query_TD, key_TD = (part.bfloat16() for part in unit)
        coarse_T = torch.nn.functional.pad((query_TD[:-1] * key_TD[1:]).sum(-1), (1, 0))
    with torch.no_grad():
        wide = (projection.weight.double().T for projection in (detector.w_q, detector.w_k))
        exact_T = neighbour_cosine(*(hidden_TD.double() @ weight for weight in wide))
    assert output.prob_T.dtype == own_cosine_T.dtype == torch.float32
    limit = float(detector.offset)
    flipped, coarse_flipped = (
        float(((cosine_T <= limit) != (exact_T <= limit))[1:].double().mean())
        for cosine_T in (own_cosine_T, coarse_T)
    )
    assert float((output.mask_T != (own_cosine_T <= limit))[1:].double().mean()) < 1e-4
    assert flipped < 5e-4
    assert coarse_flipped > 5e-3, "the control must show the difference"


@pytest.mark.parametrize("setting", ["bf16 weights", "autocast"])
def test_a_whole_model_in_half_precision_keeps_its_boundary_path(setting: str) -> None:
    """Peers' list 36: the numbers of the model are the detector's on the states that it got."""
    model = tiny_model(training=True).float()
    if setting == "bf16 weights":
        model.to(torch.bfloat16)
    got: list[Tensor] = []
    model.boundary_detector.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0]))
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=35))
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"), torch.no_grad():
        output = model(tokens_T, cu_seqlens)
    assert output.logits_TV.dtype == torch.bfloat16
    assert output.boundary.prob_T.dtype == torch.float32
    with torch.no_grad():
        exact_T = model.boundary_detector.double().cosine(got[0].double())
        offset = model.boundary_detector.offset
    inner_T = position_in_document(cu_seqlens) > 0
    # p moves by half of what a cosine moves
    expected_T = ((1 - exact_T + offset) / 2).clamp(0, 1)
    assert (output.boundary.prob_T - expected_T)[inner_T].abs().max() < 0.5e-6


@pytest.fixture(scope="module")
def real_documents() -> list[Tensor]:
    """The beginnings of real documents of four domains, in turn."""
    if not (DATA / "valid").is_dir():
        pytest.skip("no ../shared/data beside the checkout; put {valid,tokenizer}/ there to run it")
    tokenizer = load_tokenizer(DATA / "tokenizer" / "gpt2")
    domains = []
    for path in sorted((DATA / "valid").glob("*.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[:6]
        texts = [json.loads(line)["text"][:2000] for line in lines]
        domains.append([torch.tensor(tokenizer.encode(text)[:200]) for text in texts])
    return [document for documents in zip(*domains, strict=True) for document in documents]


def starting_fractions(model: DLCM, documents: list[Tensor]) -> tuple[float, float]:
    """Boundaries per token of a fresh model: thresholded and drawn."""
    with torch.no_grad():
        boundary = model.train().boundaries(*pack(documents))
    masks = (boundary.threshold_mask_T, boundary.mask_T)
    thresholded, drawn = (float(mask_T.double().mean()) for mask_T in masks)
    return thresholded, drawn


@pytest.mark.parametrize("embedding_std", [1.0, 0.02])
@pytest.mark.parametrize(("width", "layers"), [(64, 2), (64, 10), (128, 4), (256, 2)])
def test_a_calibrated_model_starts_near_its_ratio_on_real_text(
    real_documents: list[Tensor], width: int, layers: int, embedding_std: float
) -> None:
    """Peers' list 33: F in [1/(2R), 2/R]; also on other documents at the default embeddings."""
    config = tiny_config(
        vocab_size=50_304, d_token=width, encoder_layers=layers, token_ffn_size=4 * width
    )
    model = build_model(config, MupConfig(embedding_std=embedding_std))
    assert isinstance(model, DLCM)
    detector = model.boundary_detector
    first, second = real_documents[:8], real_documents[8:]
    cosine = neighbour_cosines(model, *pack(first))
    for ratio in (2.0, 4.0, 8.0):
        detector.config = dataclasses.replace(config, target_tokens_per_concept=ratio)
        detector.offset.zero_()
        uncalibrated, _ = starting_fractions(model, second)
        detector.calibrate(cosine)
        for documents in (first, second) if embedding_std == 1.0 else (first,):
            for fraction in starting_fractions(model, documents):
                assert 1 / (2 * ratio) <= fraction <= 2 / ratio
        # the control: small embeddings make all neighbours look alike
        assert embedding_std == 1.0 or uncalibrated < 1 / (2 * ratio)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_width_starts_near_its_ratio_on_real_text(
    real_documents: list[Tensor], path: Path
) -> None:
    """Peers' list 33: calibrated on some documents, thresholded on others; two encoder layers."""
    shipped = load_config(path)
    config = dataclasses.replace(
        shipped.model, **SMALL_REST, vocab_size=4096, encoder_layers=2, decoder_layers=1
    )
    model = build_model(config, shipped.mup)
    assert isinstance(model, DLCM)
    documents = [document % config.vocab_size for document in real_documents]
    first, second = documents[:4], documents[4:8]
    model.boundary_detector.calibrate(neighbour_cosines(model, *pack(first)))
    ratio = config.target_tokens_per_concept
    thresholded, _ = starting_fractions(model, second)
    assert 1 / (2 * ratio) <= thresholded <= 2 / ratio
