"""Tiny models and packed documents for the tests of the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadlcm.config import ModelConfig, MupConfig, boundary_modes
from megadlcm.model import DLCM, build_model
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.packing import Packing

VOCAB_SIZE = 48
BOUNDARY_MODES = tuple(boundary_modes.BOUNDARY_MODES)
ALIGNS = ("end", "start_shift")
WEIGHTINGS = ("count", "uniform")
SMOOTHINGS = ("ema", "none")

# every way in which a shipped model can segment, pool, smooth and read
VARIANTS = [
    {
        "boundary_mode": mode,
        "segment_align": align,
        "concept_weighting": weighting,
        "smoothing": smoothing,
    }
    for mode, align, weighting, smoothing in itertools.product(
        BOUNDARY_MODES, ALIGNS, WEIGHTINGS, SMOOTHINGS
    )
]
# options that are rarely on; each with both alignments
EXTRA_VARIANTS = [
    options | {"segment_align": align}
    for options in (
        {"max_segment_tokens": 3},
        {"cross_attention_rope": False},
        {"self_attention_qk_norm": True, "target_tokens_per_concept": 2.0},
        {"boundary_size": 8},
        {"ratio_loss_detach_hidden": True},
        {"sharpening": 1.0},
        {"token_kv_heads": 4, "concept_kv_heads": 6},
        {"boundary_mode": "rule", "rule_threshold": 0.45},
        {"boundary_mode": "fixed", "target_tokens_per_concept": 2.5},
    )
    for align in ALIGNS
]


def variant_name(options: dict[str, Any]) -> str:
    """Reads like `learned_global-end-count-ema`; options that are not words carry their key."""
    return "-".join(
        value if isinstance(value, str) else f"{key}={value}" for key, value in options.items()
    )


def tiny_config(**options: Any) -> ModelConfig:
    """Two blocks in each stack, grouped key-value heads, a head size of 4."""
    defaults: dict[str, Any] = {
        "architecture": "dlcm",
        "vocab_size": VOCAB_SIZE,
        "d_token": 16,
        "d_concept": 24,
        "encoder_layers": 2,
        "backbone_layers": 2,
        "decoder_layers": 2,
        "token_heads": 4,
        "token_kv_heads": 2,
        "concept_heads": 6,
        "concept_kv_heads": 3,
        "token_ffn_size": 24,
        "concept_ffn_size": 32,
        "target_tokens_per_concept": 3.0,
    }
    return ModelConfig(**(defaults | options))


def tiny_model(*, seed: int = 0, training: bool = False, **options: Any) -> DLCM:
    """A fp64 model that reads its concepts strongly and whose boundaries react to each token.

    The initial values are fifteen times the usual ones, and the detector is calibrated, so that a
    changed token moves boundaries and whatever leaks is seen.
    """
    config = tiny_config(**options)
    model = build_model(config, MupConfig(base_width=16, init_std=0.3), seed=seed).double()
    assert isinstance(model, DLCM)
    perturb_gains(model, seed)
    tokens_T, cu_seqlens = pack(random_documents([40, 40, 40], seed=99))
    inner = neighbour_cosines(model, tokens_T, cu_seqlens)
    if model.boundary_detector.calibrates:
        model.boundary_detector.calibrate(inner)
    elif model.boundary_detector.tracks_threshold:
        model.boundary_detector.threshold.fill_(float(((1 - inner) / 2).quantile(0.6)))
    model.train(training)
    return model


@torch.no_grad()
def neighbour_cosines(model: DLCM, tokens_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The detector's cosines of the tokens that have a predecessor."""
    hidden: list[Tensor] = []
    hook = model.boundary_detector.register_forward_pre_hook(
        lambda _module, inputs: hidden.append(inputs[0])
    )
    try:
        model.boundaries(tokens_T, cu_seqlens)
    finally:
        hook.remove()
    return model.boundary_detector.cosine(hidden[0])[position_in_document(cu_seqlens) > 0]


@torch.no_grad()
def perturb_gains(model: DLCM, seed: int) -> None:
    """Moves gains, the null concept and the detector off their symmetric initial values."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "null_concept")) or "boundary_detector" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.2 * noise)


def similar_states(num_tokens: int, size: int, common: float) -> Tensor:
    """Random states with a direction that all of them share."""
    generator = torch.Generator().manual_seed(33)
    shared = torch.randn(size, generator=generator)
    return torch.randn(num_tokens, size, generator=generator) + common * shared


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Documents of random tokens with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def pack(documents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lays documents end to end; tokens and offsets."""
    lengths = torch.tensor([0, *(document.numel() for document in documents)])
    return torch.cat(list(documents)), lengths.cumsum(0).to(torch.int32)


def position_in_document(cu_seqlens: Tensor) -> Tensor:
    """Position of each packed token inside its document."""
    return torch.cat([torch.arange(int(length)) for length in cu_seqlens.diff()])


def force_boundaries(model: DLCM, decide: Callable[[Tensor], Tensor]) -> None:
    """Replaces the detector's decision by a function of the position inside the document."""
    original = model.boundary_detector.forward

    def forward(hidden_TD: Tensor, packing: Packing, sampling: BoundarySampling) -> BoundaryOutput:
        output = original(hidden_TD, packing, sampling)
        mask_T = decide(packing.position) | (packing.position == 0)
        return dataclasses.replace(output, mask_T=mask_T, threshold_mask_T=mask_T)

    model.boundary_detector.forward = forward  # type: ignore[method-assign]
