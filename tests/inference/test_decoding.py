"""Decoding token by token is the parallel forward (peers' list 37, 40, 41)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.inference.decoding import DecodeState, decode_step
from megadlcm.model import DLCM
from megadlcm.model.chunking import ReaderState
from megadlcm.model.transformer import KeyValueCache
from megadlcm.ops.packing import packing_from_offsets
from megadlcm.ops.smoothing import exponential_smoothing
from tests.support.tiny_models import (
    ALIGNS,
    EXTRA_VARIANTS,
    VARIANTS,
    random_documents,
    tiny_model,
    variant_name,
)

NUM_TOKENS = 20


def decode(model: DLCM, tokens_T: Tensor) -> tuple[Tensor, DecodeState]:
    """Logits of every step and the state after the last one."""
    state = DecodeState()
    return torch.stack([decode_step(model, state, int(token)) for token in tokens_T]), state


@pytest.mark.parametrize("options", VARIANTS + EXTRA_VARIANTS, ids=variant_name)
def test_every_step_equals_the_forward_of_the_whole_document(options: dict[str, Any]) -> None:
    """Peers' list 37, fp64."""
    model = tiny_model(**options)
    inner_boundaries = 0
    for tokens_T in random_documents([NUM_TOKENS] * 2, seed=33):
        with torch.no_grad():
            whole = model(tokens_T, torch.tensor([0, NUM_TOKENS]))
        stepped, state = decode(model, tokens_T)
        assert (stepped - whole.logits_TV).abs().max() < 1e-12
        assert state.num_concepts == whole.layout.num_concepts
        inner_boundaries += whole.layout.num_concepts - 1
    assert 2 < inner_boundaries < 2 * NUM_TOKENS - 4


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("mode", ["learned_global", "rule", "fixed"])
def test_the_backbone_runs_once_for_each_boundary(
    monkeypatch: pytest.MonkeyPatch, mode: str, align: str
) -> None:
    """Peers' list 40: the other steps cost the token stacks alone."""
    model = tiny_model(boundary_mode=mode, segment_align=align)
    runs = {"encoder": 0, "backbone": 0, "decoder": 0}
    for name in runs:
        stack = getattr(model, name)

        def count(_module: object, _inputs: object, name: str = name) -> None:
            runs[name] += 1

        stack.layers[0].attention.wo.register_forward_pre_hook(count)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=32)
    decode(model, tokens_T)
    stepped = dict(runs)
    mask_T = model.boundaries(tokens_T, torch.tensor([0, NUM_TOKENS])).mask_T
    assert 1 < int(mask_T.sum()) < NUM_TOKENS
    assert stepped == {
        "encoder": NUM_TOKENS,
        "backbone": int(mask_T.sum()),
        "decoder": NUM_TOKENS,
    }


@pytest.mark.parametrize("align", ALIGNS)
def test_caches_hold_one_row_for_each_concept_and_counts_that_sum_to_the_tokens(
    align: str,
) -> None:
    """Peers' list 41, and every count is that of the layout."""
    model = tiny_model(segment_align=align)
    (tokens_T,) = random_documents([NUM_TOKENS], seed=33)
    state = DecodeState()
    for length in range(1, NUM_TOKENS + 1):
        decode_step(model, state, int(tokens_T[length - 1]))
        layout = model(tokens_T[:length], torch.tensor([0, length])).layout
        assert state.reader.run_lengths == layout.run_length_M.tolist()
        assert sum(state.reader.run_lengths) == length
        assert state.encoder.length == state.decoder.length == length
        assert state.backbone.length == state.num_concepts == layout.num_concepts
        caches = [state.reader.concepts, *state.backbone.blocks]
        assert len(caches) == 3
        assert all(part.shape[0] == layout.num_concepts for cache in caches for part in cache.rows)
        assert state.pool.count == int((layout.pooled_concept_T < 0).sum())


def test_a_document_of_one_token_can_be_decoded() -> None:
    """Peers' list 37, the smallest case."""
    for align in ALIGNS:
        model = tiny_model(segment_align=align)
        logits, state = decode(model, torch.tensor([5]))
        whole = model(torch.tensor([5]), torch.tensor([0, 1])).logits_TV
        assert (logits - whole).abs().max() < 1e-12
        assert state.num_concepts == 1


def test_decoding_thresholds_and_draws_nothing() -> None:
    """Peers' list 34: neither the random state nor the gradient tape is touched."""
    model = tiny_model()
    (tokens_T,) = random_documents([8], seed=34)
    random_state = torch.get_rng_state()
    logits, _ = decode(model, tokens_T)
    assert torch.equal(random_state, torch.get_rng_state())
    assert not logits.requires_grad
    assert torch.equal(logits, decode(model, tokens_T)[0])


@pytest.mark.parametrize("ratio", [1.1, 2.2, 3.7])
def test_fixed_boundaries_fall_on_the_same_tokens(ratio: float) -> None:
    """Quotients near an integer: 11 / 2.2 is 5 and 11 // 2.2 is 4."""
    model = tiny_model(boundary_mode="fixed", target_tokens_per_concept=ratio)
    (tokens_T,) = random_documents([80], seed=36)
    stepped, state = decode(model, tokens_T)
    with torch.no_grad():
        whole = model(tokens_T, torch.tensor([0, 80]))
    assert state.reader.run_lengths == whole.layout.run_length_M.tolist()
    assert (stepped - whole.logits_TV).abs().max() < 1e-12
    assert any((place / ratio).is_integer() for place in range(1, 80))


# largest difference of logits, share of equal decisions, distance from the threshold of the others
LOWER_PRECISION = {torch.float32: (1e-4, 0.999, 1e-6), torch.bfloat16: (0.15, 0.995, 2e-3)}


@pytest.mark.parametrize("dtype", LOWER_PRECISION, ids=str)
def test_decoding_in_lower_precision_stays_close(dtype: torch.dtype) -> None:
    """Peers' list 37: the same decisions on 99.9 % of tokens in fp32, on 99.5 % in bf16.

    In bf16 the encoder rounds a row otherwise alone than among others. That moves decisions within
    0.002 of the threshold and no others.
    """
    tolerance, agreement, margin = LOWER_PRECISION[dtype]
    agreed, tokens, clear = 0, 0, 0
    for seed in range(3):
        model = tiny_model(seed=seed).to(dtype)
        for tokens_T in random_documents([32] * 16, seed=35 + seed):
            stepped, state = decode(model, tokens_T)
            with torch.no_grad():
                whole = model(tokens_T, torch.tensor([0, 32]))
            mask_T = run_starts(state)
            same_T = mask_T == whole.boundary_mask_T
            is_clear_T = (whole.boundary_prob_T - 0.5).abs() > margin
            assert bool(same_T[is_clear_T].all())
            agreed, tokens = agreed + int(same_T.sum()), tokens + 32
            clear += int(is_clear_T.sum())
            if bool(same_T.all()):
                difference = (stepped - whole.logits_TV).float()
                scale = whole.logits_TV.float().square().mean().sqrt()
                assert difference.square().mean().sqrt() / scale < tolerance
    assert agreed / tokens >= agreement
    assert clear / tokens > 0.98, "few decisions are left out"


def run_starts(state: DecodeState) -> Tensor:
    """Boundaries of the tokens that were decoded, bool."""
    starts = [[True] + [False] * (length - 1) for length in state.reader.run_lengths]
    return torch.tensor([start for run in starts for start in run])


def test_the_moving_average_is_carried_in_fp32() -> None:
    """In bf16 a small step towards a concept is lost altogether, and the average stands still."""
    model = tiny_model().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(37)
    concept_MC = (1 + 0.2 * torch.rand(600, 24, generator=generator)).bfloat16()
    weight_M = torch.full((600,), 0.01)
    packing = packing_from_offsets(torch.tensor([0, 600]))
    expected = exponential_smoothing(concept_MC.double(), weight_M, packing)
    state, coarse, steps = ReaderState(), concept_MC[:1], []
    for concept_1C, weight in zip(concept_MC.split(1), weight_M, strict=True):
        steps.append(model.concept_reader.smooth_step(concept_1C, weight, state))
        mixed = weight * concept_1C.float() + (1 - weight) * coarse.float()
        coarse = mixed.bfloat16()
    assert state.smooth_1C.dtype == torch.float32
    assert (state.smooth_1C - expected[-1]).abs().max() < 1e-5
    assert (torch.cat(steps) / expected - 1).abs().max() < 2**-8, "one rounding"
    assert (coarse - expected[-1]).abs().max() > 1e-2, "the control must show the difference"


def test_counts_are_not_rounded_to_half_precision() -> None:
    """With equal scores concept k weighs n_k / n; logs rounded to bf16 are off by a per cent."""
    model = tiny_model(token_kv_heads=4).to(torch.bfloat16)
    runs = [1000, 700, 300, 7]
    value = torch.eye(4).unsqueeze(1).expand(4, 4, 4).bfloat16()
    state = ReaderState(KeyValueCache(torch.zeros_like(value), value), run_lengths=runs)
    with torch.no_grad():
        model.concept_reader.wo.weight.copy_(torch.eye(16))
        hidden_1D = torch.randn(1, 16, generator=torch.Generator().manual_seed(38)).bfloat16()
        read_1D = model.concept_reader._read_step(hidden_1D, state)
    expected = torch.tensor(runs, dtype=torch.float64).div(sum(runs)).repeat(4)
    assert (read_1D[0] / expected - 1).abs().max() <= 2**-8, "one rounding of the result"
