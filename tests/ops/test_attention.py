"""Attention over packed documents against explicit softmaxes (peers' list 22-24, 26, 27)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megadlcm.ops.attention import choose_backend, concept_attention, self_attention
from megadlcm.ops.backends import reference
from megadlcm.ops.packing import Packing, packing_from_offsets
from megadlcm.ops.segments import ConceptLayout, concept_layout, replicate

ALIGNS = ("end", "start_shift")
HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, key-value heads
HEAD_SIZE = 6
CUDA = torch.device("cuda")
Triple = tuple[Tensor, Tensor, Tensor]
# documents as lists of decisions; the first token of each is a boundary whatever is drawn
packs = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5)
each_align = pytest.mark.parametrize("align", ALIGNS)
each_heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS)


def packing_of(lengths: list[int], device: str = "cpu") -> Packing:
    """Documents of these lengths."""
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return packing_from_offsets(offsets, sum(lengths))


def layout_of(decisions: list[list[bool]], align: str) -> tuple[Packing, ConceptLayout]:
    """Documents with these boundaries, and their concepts."""
    packing = packing_of([len(document) for document in decisions])
    mask_T = torch.tensor([decision for document in decisions for decision in document])
    return packing, concept_layout(mask_T | (packing.position == 0), packing, align)


def draw(seed: int, query_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> Triple:
    """Random fp64 queries, keys and values; large enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        (1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in (query_shape, kv_shape, kv_shape)
    )
    return query, key, value


def case(packing: Packing, layout: ConceptLayout, heads: int, kv_heads: int) -> Triple:
    """Queries of the tokens, keys and values of the concepts."""
    concepts = (layout.num_concepts, kv_heads, HEAD_SIZE)
    return draw(0, (packing.num_rows, heads, HEAD_SIZE), concepts)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(H) + bias) V with each key-value head written out as often as used."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = torch.einsum("tnh,unh->ntu", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("ntu,unh->tnh", (scores + bias).softmax(-1), value)


def explicit_self_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """One dense softmax over the whole pack; whatever is later or of another document is masked."""
    document_T, row = packing.document_index(), torch.arange(packing.num_rows)
    seen = (document_T.unsqueeze(1) == document_T) & (row.unsqueeze(1) >= row)
    bias = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, -torch.inf)
    return explicit_attention(query, key, value, bias)


def uniform_bias(packing: Packing, layout: ConceptLayout) -> Tensor:
    """Eq. 14's mask over the pack, token by token: 0 for concepts of the document up to j(t)."""
    bias = torch.full((packing.num_rows, layout.num_concepts), -torch.inf, dtype=torch.float64)
    for token, document in enumerate(packing.document_index().tolist()):
        first, newest = layout.packing.bounds[document], int(layout.visible_concept_T[token])
        bias[token, first : newest + 1] = 0.0
    return bias


def assert_same(outputs: tuple[Tensor, Tensor], inputs: Triple, tolerance: float = 1e-12) -> None:
    """Compares two functions of the same inputs: values and every gradient."""
    fast, slow = outputs
    assert (fast - slow).abs().max() < tolerance
    upstream = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9)).to(fast)
    pairs = zip(*(torch.autograd.grad(part, inputs, upstream) for part in outputs), strict=True)
    for gradient, expected in pairs:
        assert (gradient - expected).abs().max() < tolerance


@each_heads
@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [1, 1, 1], [3, 3, 3, 1, 1, 5, 2, 2], [4, 1, 4, 4], [2, 5, 5, 5, 5, 1]],
    ids=str,
)
def test_self_attention_is_a_softmax_in_each_document(
    lengths: list[int], heads: int, kv_heads: int
) -> None:
    """Runs of documents of equal length go through one batched call; their neighbours do not."""
    packing = packing_of(lengths)
    rows = packing.num_rows
    inputs = draw(1, (rows, heads, HEAD_SIZE), (rows, kv_heads, HEAD_SIZE))
    actual = self_attention(*inputs, packing, "reference")
    assert_same((actual, explicit_self_attention(*inputs, packing)), inputs)


def test_documents_of_equal_length_share_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard: without it the batched path above could be dead."""
    calls: list[int] = []
    run = reference.masked_attention

    def count(query: Tensor, key: Tensor, value: Tensor, bias: None, count: int = 1) -> Tensor:
        calls.append(count)
        return run(query, key, value, bias, count)

    monkeypatch.setattr(reference, "masked_attention", count)
    packing = packing_of([3, 3, 3, 1, 5, 5, 2])
    inputs = draw(2, *[(packing.num_rows, 2, HEAD_SIZE)] * 2)
    self_attention(*inputs, packing, "reference")
    assert calls == [3, 1, 2, 1]


@each_heads
@each_align
@settings(deadline=None, max_examples=40, derandomize=True)
@given(decisions=packs)
def test_counted_concepts_equal_replicated_concepts_under_a_causal_mask(
    align: str, heads: int, kv_heads: int, decisions: list[list[bool]]
) -> None:
    """Peers' list 22: Eq. 17's kernel and the mask with log n_k(t), values and all gradients."""
    packing, layout = layout_of(decisions, align)
    query, key, value = inputs = case(packing, layout, heads, kv_heads)
    counted = concept_attention(query, key, value, packing, layout, "count", "reference")
    copies = replicate(key, layout), replicate(value, layout)
    replicated = self_attention(query, *copies, packing, "reference")
    assert_same((counted, replicated), inputs)


@each_heads
@each_align
@settings(deadline=None, max_examples=25, derandomize=True)
@given(decisions=packs)
def test_uniform_concepts_are_equation_14(
    align: str, heads: int, kv_heads: int, decisions: list[list[bool]]
) -> None:
    """Peers' list 23."""
    packing, layout = layout_of(decisions, align)
    query, key, value = inputs = case(packing, layout, heads, kv_heads)
    uniform = concept_attention(query, key, value, packing, layout, "uniform", "reference")
    assert_same((uniform, explicit_attention(*inputs, uniform_bias(packing, layout))), inputs)


@each_align
def test_simpler_biases_are_another_function_than_replication(align: str) -> None:
    """Peers' list 24: no bias at all, or log of the whole run also for the newest concept."""
    decisions = [[True, False, False, True, False, True, False], [True, True, False, False]]
    packing, layout = layout_of(decisions, align)
    inputs = case(packing, layout, 4, 2)
    counted = concept_attention(*inputs, packing, layout, "count", "reference")
    uniform = concept_attention(*inputs, packing, layout, "uniform", "reference")
    no_bias = uniform_bias(packing, layout)
    column_bias = no_bias + layout.run_length_M.double().log()
    columns = explicit_attention(*inputs, column_bias)
    for other in (uniform, columns):
        assert (counted - other).abs().max() > 0.05
    # the newest concept counts in part until its run ends: there the columns agree, before not
    deviation_T = (counted - columns).abs().amax((1, 2))
    assert deviation_T[[2, 4, 6, 7, 10]].max() < 1e-12
    assert deviation_T[[3, 5, 8, 9]].min() > 1e-3


@each_heads
@each_align
@pytest.mark.parametrize("weighting", ["count", "uniform"])
def test_a_concept_for_every_token_is_causal_self_attention(
    weighting: str, align: str, heads: int, kv_heads: int
) -> None:
    """Peers' list 26, R = 1."""
    packing, layout = layout_of([[True] * length for length in (5, 1, 8, 1, 2)], align)
    assert layout.num_concepts == packing.num_rows
    inputs = case(packing, layout, heads, kv_heads)
    actual = concept_attention(*inputs, packing, layout, weighting, "reference")
    assert_same((actual, self_attention(*inputs, packing, "reference")), inputs)


@each_align
@pytest.mark.parametrize("weighting", ["count", "uniform"])
def test_one_concept_is_broadcast_over_its_document(weighting: str, align: str) -> None:
    """Peers' list 26, M = 1: the output is that concept's value, whatever queries and keys say."""
    lengths = [4, 1, 3]
    packing, layout = layout_of([[True] + [False] * (length - 1) for length in lengths], align)
    query, key, value = case(packing, layout, 4, 2)
    actual = concept_attention(query, key, value, packing, layout, weighting, "reference")
    broadcast = value.repeat_interleave(2, dim=1).repeat_interleave(torch.tensor(lengths), dim=0)
    assert (actual - broadcast).abs().max() < 1e-14
    gradients = torch.autograd.grad(actual.square().sum(), (query, key))
    assert max(float(part.abs().max()) for part in gradients) < 1e-12


@pytest.mark.parametrize("kind", ["self", "count", "uniform"])
def test_the_order_of_documents_only_orders_the_outputs(kind: str) -> None:
    """Peers' list 27; two documents of equal length come together in some orders only."""
    decisions = [[True, False, True], [True], [True, True, False], [True, False, False, False]]
    packing, layout = layout_of(decisions, "end")
    query, key, value = case(packing, layout, 4, 2)
    rows, concepts = packing.lengths, layout.packing.lengths
    if kind == "self":
        concepts = rows
        key, value = replicate(key, layout), replicate(value, layout)

    def attend(order: tuple[int, ...]) -> list[Tensor]:
        packing, layout = layout_of([decisions[index] for index in order], "end")
        ordered_query, ordered_key, ordered_value = (
            torch.cat([part.split(sizes)[index] for index in order])
            for part, sizes in ((query, rows), (key, concepts), (value, concepts))
        )
        inputs = ordered_query, ordered_key, ordered_value
        if kind == "self":
            output = self_attention(*inputs, packing, "reference")
        else:
            output = concept_attention(*inputs, packing, layout, kind, "reference")
        return list(output.split([rows[index] for index in order]))

    expected = attend((0, 1, 2, 3))
    assert (expected[0] - expected[2]).abs().max() > 0.1
    for order in itertools.permutations(range(4)):
        for index, output in zip(order, attend(order), strict=True):
            assert (output - expected[index]).abs().max() < 1e-12


def equal_scores(runs: list[int]) -> tuple[Packing, ConceptLayout, Triple]:
    """One document whose concepts all score 0; value k is the unit vector k, in bf16."""
    packing, layout = layout_of([[token == 0 for run in runs for token in range(run)]], "end")
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(packing.num_rows, 4, HEAD_SIZE, generator=generator)
    value = torch.eye(len(runs), HEAD_SIZE).unsqueeze(1).expand(-1, 2, -1)
    parts = query, torch.zeros_like(value), value
    query, key, value = (part.to(torch.bfloat16).requires_grad_() for part in parts)
    return packing, layout, (query, key, value)


def test_half_precision_does_not_round_the_counts() -> None:
    """With equal scores concept k weighs n_k / n; logs rounded to bf16 are off by a per cent."""
    packing, layout, inputs = equal_scores([1000, 700, 300, 7])
    output = concept_attention(*inputs, packing, layout, "count", "reference")
    assert output.dtype == torch.bfloat16
    weights = torch.tensor([1000, 700, 300, 7], dtype=torch.float64) / 2007
    error = (output[-1, :, :4].double() / weights - 1).abs().max()
    assert error <= 2**-8, "one rounding of the result"
    rounded = torch.tensor([1000.0, 700.0, 300.0, 7.0]).log().bfloat16().double().softmax(0)
    assert (rounded / weights - 1).abs().max() > 2**-7, "the control must show the difference"
    output.float().sum().backward()
    assert all(part.grad.dtype == torch.bfloat16 for part in inputs)


def test_counts_are_not_rounded_under_autocast() -> None:
    """It would take queries, keys and the mask to bf16, whatever type they have."""
    packing, layout, halves = equal_scores([1000, 700, 300, 7])
    inputs = halves[0].float(), halves[1].float(), halves[2].float()
    expected = concept_attention(*inputs, packing, layout, "count", "reference")
    with torch.autocast("cpu", torch.bfloat16):
        output = concept_attention(*inputs, packing, layout, "count", "reference")
    assert torch.equal(output, expected)


def as_leaves(parts: Triple, dtype: torch.dtype) -> Triple:
    """The same values in this type on the GPU, as inputs that ask for gradients."""
    query, key, value = (part.detach().to(CUDA, dtype).requires_grad_() for part in parts)
    return query, key, value


def require_kernel(name: str) -> None:
    """Skips where the kernel's package is missing."""
    try:
        choose_backend(name, CUDA, torch.bfloat16, [64])
    except ValueError:
        hint = {"flash_attn": "pip install -e .[gpu]", "varlen": "a torch with torch.nn.attention"}
        pytest.skip(f"{name} cannot run: {hint[name]}, on a GPU from 2020 on, would provide it")


def relative_error(outputs: tuple[Tensor, Tensor], inputs: Triple, wide: Triple) -> float:
    """Largest error of the output or a gradient against fp64, relative to its norm."""
    upstream = torch.randn_like(outputs[0])
    fast = (outputs[0], *torch.autograd.grad(outputs[0], inputs, upstream))
    slow = (outputs[1], *torch.autograd.grad(outputs[1], wide, upstream.double()))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(fast, slow, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; a GPU would provide it")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
@pytest.mark.parametrize("kind", ["self", "concepts"])
def test_kernels_agree_with_the_reference(kind: str, name: str, kv_heads: int) -> None:
    """Peers' list 22 and 27: bf16 against the reference in fp64, values and all gradients."""
    require_kernel(name)
    packing = packing_of([1, 300, 64, 64, 2, 129, 1], "cuda")
    generator = torch.Generator().manual_seed(3)
    mask_T = (torch.rand(packing.num_rows, generator=generator) < 0.25).cuda()
    layout = concept_layout(mask_T | (packing.position == 0), packing, "end")
    rows = packing.num_rows if kind == "self" else layout.num_concepts
    inputs = as_leaves(draw(0, (packing.num_rows, 4, 64), (rows, kv_heads, 64)), torch.bfloat16)
    wide = as_leaves(inputs, torch.float64)

    def attend(parts: Triple, backend: str, weighting: str = "count") -> Tensor:
        if kind == "self":
            return self_attention(*parts, packing, backend)
        return concept_attention(*parts, packing, layout, weighting, backend)

    actual = attend(inputs, name)
    assert actual.dtype == torch.bfloat16
    assert relative_error((actual, attend(wide, "reference")), inputs, wide) < 2e-2
    if kind == "concepts":
        other = attend(wide, "reference", "uniform")
        assert relative_error((attend(inputs, name), other), inputs, wide) > 5e-2, "not vacuous"
