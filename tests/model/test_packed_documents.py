"""Packed documents are strangers to each other (peers' list 9-13)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadlcm.model import DLCM, build_model
from megadlcm.ops.cross_entropy import token_cross_entropy
from tests.support.tiny_models import (
    ALIGNS,
    BOUNDARY_MODES,
    EXTRA_VARIANTS,
    VARIANTS,
    pack,
    random_documents,
    tiny_config,
    tiny_model,
    variant_name,
)

# lengths 1 and 2 first, last and in the middle; two documents of equal length side by side
LENGTHS = (1, 9, 2, 13, 7, 7, 1, 2, 10, 1)
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
each_variant = pytest.mark.parametrize("options", VARIANTS + EXTRA_VARIANTS, ids=variant_name)


def labels_of(documents: list[Tensor]) -> list[Tensor]:
    """The next token of each token; the first token closes the document."""
    return [document.roll(-1) for document in documents]


def open_tail_lengths(model: DLCM, tokens_T: Tensor, cu_seqlens: Tensor) -> list[int]:
    """Tokens of each document that no concept holds."""
    layout = model(tokens_T, cu_seqlens).layout
    assert layout is not None
    parts = layout.pooled_concept_T.split(cu_seqlens.diff().tolist())
    return [int((part < 0).sum()) for part in parts]


@each_mode
@each_variant
def test_a_packed_document_has_the_logits_of_the_document_alone(
    options: dict[str, Any], training: bool
) -> None:
    """Peers' list 9; some document with an open segment stands before another one."""
    model = tiny_model(training=training, **options)
    documents = random_documents(LENGTHS, seed=21)
    with torch.no_grad():
        tails = open_tail_lengths(model, *pack(documents))
        assert max(tails[:-1]) > 0, "no document has an unfinished tail before the next one"
        packed = model(*pack(documents))
        alone = [model(*pack([document])) for document in documents]
    assert packed.boundary_mask_T is not None
    assert torch.equal(
        packed.boundary_mask_T, torch.cat([output.boundary_mask_T for output in alone])
    )
    difference = packed.logits_TV - torch.cat([output.logits_TV for output in alone])
    assert difference.abs().max() < 1e-12
    assert packed.layout.num_concepts == sum(output.layout.num_concepts for output in alone)


@each_mode
@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_the_loss_and_gradients_of_a_pack_are_the_sums_over_its_documents(
    mode: str, align: str, training: bool
) -> None:
    """Peers' list 9: cross-entropy and boundary probabilities, and what they train."""
    model = tiny_model(training=training, boundary_mode=mode, segment_align=align)
    documents = random_documents(LENGTHS, seed=22)
    labels = labels_of(documents)

    def loss_and_gradients(
        documents: list[Tensor], labels: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        output = model(*pack(documents))
        loss = token_cross_entropy(output.logits_TV, torch.cat(labels)).sum()
        loss = loss + 0.7 * output.boundary_prob_T.sum()
        loss.backward()
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for name, weight in model.named_parameters()
        }
        return loss.detach(), gradients

    loss, gradients = loss_and_gradients(documents, labels)
    pieces = [
        loss_and_gradients([one], [label]) for one, label in zip(documents, labels, strict=True)
    ]
    torch.testing.assert_close(loss, sum(piece[0] for piece in pieces), rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        expected = sum(piece[1][name] for piece in pieces)
        scale = float(expected.abs().max()) + 1e-3
        assert (gradient - expected).abs().max() < 1e-11 * scale, name


@each_mode
@pytest.mark.parametrize("options", VARIANTS[::3], ids=variant_name)
def test_editing_one_document_leaves_the_others_as_they_were(
    options: dict[str, Any], training: bool
) -> None:
    """Peers' list 10: bitwise in boundaries, and to rounding in logits (M moves the matrices)."""
    model = tiny_model(training=training, **options)
    documents = random_documents((11, 8, 12), seed=23)
    edited = [documents[0], documents[1].flip(0), documents[2]]
    with torch.no_grad():
        before, after = model(*pack(documents)), model(*pack(edited))
    others = torch.cat((torch.arange(11), torch.arange(19, 31)))
    assert torch.equal(before.boundary_mask_T[others], after.boundary_mask_T[others])
    assert torch.equal(before.boundary_prob_T[others], after.boundary_prob_T[others])
    assert (before.logits_TV - after.logits_TV)[others].abs().max() < 1e-12
    assert (before.logits_TV - after.logits_TV)[11:19].abs().max() > 1e-3


@each_mode
@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_a_first_token_is_not_compared_with_the_previous_document(
    mode: str, training: bool
) -> None:
    """Peers' list 11: that state may be NaN; document starts have p = 1 and b = 1."""
    model = tiny_model(training=training, boundary_mode=mode)
    tokens_T, cu_seqlens = pack(random_documents((6, 9, 1, 7), seed=24))
    starts = cu_seqlens[:-1].long()
    clean = model(tokens_T, cu_seqlens)

    def poison(_module: object, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TD = inputs[0].clone()
        hidden_TD[cu_seqlens[1:].long() - 1] = torch.nan
        return (hidden_TD, *inputs[1:])

    model.boundary_detector.register_forward_pre_hook(poison)
    poisoned = model(tokens_T, cu_seqlens)
    for output in (clean, poisoned):
        assert torch.equal(output.boundary_prob_T[starts].detach(), torch.ones(4).double())
        assert output.boundary_mask_T[starts].all()
        # in `ema_ste` the poisoned token's own probability multiplies what it reads
        assert mode == "ema_ste" or output.logits_TV.isfinite().all()
    after_start = starts[:2] + 1
    assert torch.equal(poisoned.boundary_prob_T[after_start], clean.boundary_prob_T[after_start])


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 3, 6], [0, 0, 6], [0, 6, 6], [0, 4, 2, 6]])
def test_a_document_without_tokens_is_refused(cu_seqlens: list[int]) -> None:
    """Peers' list 12."""
    model = tiny_model()
    with pytest.raises(ValueError, match=r"names document \d with -?\d rows"):
        model(torch.arange(6), torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize("cu_seqlens", [[0], [], [0, 5], [1, 6], [0, 7], [0, 3, 9]])
def test_offsets_that_do_not_span_the_tokens_are_refused(cu_seqlens: list[int]) -> None:
    """Peers' list 12."""
    model = tiny_model()
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the number of rows"):
        model(torch.arange(6), torch.tensor(cu_seqlens, dtype=torch.int32))


@each_mode
@pytest.mark.parametrize("align", ALIGNS)
def test_a_document_appended_as_padding_changes_nothing(align: str, training: bool) -> None:
    """Peers' list 13: padding is one more document, which the caller leaves out of the loss."""
    model = tiny_model(training=training, segment_align=align)
    documents = random_documents((9, 4), seed=25)
    label_T = torch.cat(labels_of(documents))
    plain = model(*pack(documents))
    loss = token_cross_entropy(plain.logits_TV, label_T).sum()
    for padding in (1, 7):
        output = model(*pack([*documents, torch.zeros(padding, dtype=torch.int64)]))
        padded_loss = token_cross_entropy(output.logits_TV[:13], label_T).sum()
        torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=0)
        assert torch.equal(output.boundary_mask_T[:13], plain.boundary_mask_T)


def test_packed_documents_of_the_dense_control_equal_each_document_alone() -> None:
    """Peers' list 9, for the control."""
    model = build_model(tiny_config(architecture="dense")).double()
    documents = random_documents(LENGTHS, seed=26)
    packed = model(*pack(documents))
    alone = torch.cat([model(*pack([document])).logits_TV for document in documents])
    assert (packed.logits_TV - alone).abs().max() < 1e-12
    assert packed.boundary_prob_T is None
    assert packed.boundary_mask_T is None


@each_mode
@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_recomputing_blocks_changes_no_bit(mode: str, training: bool) -> None:
    """Peers' list 44: same loss, gradients and concepts; the boundaries are drawn once."""
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=27))
    results: list[tuple[Tensor, Tensor, dict[str, nn.Parameter]]] = []
    for recompute in ("none", "block"):
        model = tiny_model(training=training, boundary_mode=mode)
        model.set_recompute(recompute)
        output = model(tokens_T, cu_seqlens)
        loss = token_cross_entropy(output.logits_TV, tokens_T).sum() + output.boundary_prob_T.sum()
        torch.manual_seed(len(results))
        loss.backward()
        results.append((loss, output.boundary_mask_T, dict(model.named_parameters())))
    (loss, mask_T, weights), (other_loss, other_mask_T, other_weights) = results
    assert torch.equal(loss, other_loss)
    assert torch.equal(mask_T, other_mask_T)
    for name, weight in weights.items():
        other = other_weights[name].grad
        assert (weight.grad is None) == (other is None), name
        assert weight.grad is None or torch.equal(weight.grad, other), name


def test_blocks_are_recomputed_when_asked() -> None:
    """A guard against an option that does nothing: each block runs once more in the backward."""
    tokens_T, cu_seqlens = pack(random_documents((5, 6), seed=28))
    for recompute, runs in (("none", 1), ("block", 2)):
        model = tiny_model(training=True)
        model.set_recompute(recompute)
        calls: list[str] = []
        for stack in model.stacks:
            for block in stack.layers:
                block.attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(""))
        detector_calls: list[str] = []
        model.boundary_detector.register_forward_pre_hook(
            lambda *_, calls=detector_calls: calls.append("")
        )
        model(tokens_T, cu_seqlens).logits_TV.sum().backward()
        assert len(calls) == 6 * runs
        assert len(detector_calls) == 1


def test_an_unknown_recompute_mode_is_refused() -> None:
    """The message names what is possible."""
    with pytest.raises(ValueError, match="none, selective or block"):
        tiny_model().set_recompute("full")


def test_the_order_of_documents_in_a_pack_only_orders_the_outputs() -> None:
    """Peers' list 27, at the level of the model."""
    model = tiny_model()
    documents = random_documents((4, 9, 1), seed=29)
    with torch.no_grad():
        reference = model(*pack(documents)).logits_TV.split([4, 9, 1])
        for order in itertools.permutations(range(3)):
            chosen = [documents[index] for index in order]
            outputs = model(*pack(chosen)).logits_TV.split([len(one) for one in chosen])
            for index, output in zip(order, outputs, strict=True):
                assert (output - reference[index]).abs().max() < 1e-12
