"""Decoding token by token is the parallel forward (peers' list 37, 40, 41)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.model import DLCM
from megadlcm.model.decoding import DecodeState, decode_step
from tests.tiny_models import (
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

        stack.blocks[0].attention.wo.register_forward_pre_hook(count)
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
        assert state.run_lengths == layout.run_length_M.tolist()
        assert sum(state.run_lengths) == length
        assert state.encoder.length == state.decoder.length == length
        assert state.backbone.length == state.num_concepts == layout.num_concepts
        assert state.concept_key.shape[0] == state.concept_value.shape[0] == layout.num_concepts
        assert all(key.shape[0] == layout.num_concepts for key in state.backbone.keys)
        assert state.open_count == int((layout.pooled_concept_T < 0).sum())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_in_lower_precision_stays_close(dtype: torch.dtype) -> None:
    """Peers' list 37: the same decisions on at least 99.9 % of tokens in fp32, 97 % in bf16."""
    tolerance, agreement = {torch.float32: (1e-4, 0.999), torch.bfloat16: (0.15, 0.97)}[dtype]
    model = tiny_model().to(dtype)
    agreed, tokens = 0, 0
    for tokens_T in random_documents([32] * 6, seed=35):
        state, decisions, logits = DecodeState(), [], []
        for token in tokens_T:
            concepts = state.num_concepts
            logits.append(decode_step(model, state, int(token)))
            decisions.append(state.num_concepts > concepts)
        whole = model(tokens_T, torch.tensor([0, 32]))
        same = torch.tensor(decisions) == whole.boundary_mask_T
        agreed, tokens = agreed + int(same.sum()), tokens + 32
        if bool(same.all()):
            difference = (torch.stack(logits) - whole.logits_TV).float()
            scale = whole.logits_TV.float().square().mean().sqrt()
            assert difference.square().mean().sqrt() / scale < tolerance
    assert agreed / tokens >= agreement
