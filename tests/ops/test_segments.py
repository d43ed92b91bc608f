"""Segmentation algebra and mean pooling, against plain loops (peers' list 14, 15, 18-21)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadlcm.ops.packing import Packing, packing_from_offsets
from megadlcm.ops.segments import ConceptLayout, concept_layout, replicate, segment_mean

ALIGNS = ("end", "start_shift")
# documents as lists of decisions; the first token of each is a boundary whatever is drawn
documents_of_decisions = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6
)


def packed_mask(documents: list[list[bool]]) -> tuple[Tensor, Packing]:
    """Joins the decisions of several documents."""
    offsets = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    packing = packing_from_offsets(offsets, int(offsets[-1]))
    mask_T = torch.tensor([decision for document in documents for decision in document])
    return mask_T | (packing.position == 0), packing


def random_layout(
    num_tokens: int, share: float, align: str, num_documents: int = 1, seed: int = 0
) -> ConceptLayout:
    """Boundaries drawn with a given share in documents of about equal length."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.linspace(0, num_tokens, num_documents + 1).long()
    packing = packing_from_offsets(offsets, num_tokens)
    mask_T = (torch.rand(num_tokens, generator=generator) < share) | (packing.position == 0)
    return concept_layout(mask_T, packing, align)


def loop_layout(mask_T: Tensor, packing: Packing, align: str) -> dict[str, list[int]]:
    """The table in the docstring of segments.py, token by token."""
    mask = mask_T.tolist()
    cu_concepts, visible, pooled = [0], [], []
    boundaries: list[int] = []
    for start, stop in zip(packing.bounds, packing.bounds[1:], strict=False):
        first = len(boundaries)
        pending: list[int] = []
        pools = [-1] * (stop - start)
        for token in range(start, stop):
            if align == "end":
                pending.append(token)
            if mask[token]:
                for member in pending:
                    pools[member - start] = len(boundaries)
                pending = []
                boundaries.append(token)
            if align == "start_shift":
                pending.append(token)
            visible.append(len(boundaries) - 1)
        pooled += pools
        assert len(boundaries) > first
        cu_concepts.append(len(boundaries))
    return {
        "cu_concepts": cu_concepts,
        "visible": visible,
        "pooled": pooled,
        "boundaries": boundaries,
    }


@pytest.mark.parametrize("align", ALIGNS)
@settings(deadline=None, max_examples=150, derandomize=True)
@given(documents=documents_of_decisions)
def test_the_layout_equals_a_loop_over_tokens(align: str, documents: list[list[bool]]) -> None:
    """Peers' list 15: offsets of concepts, who pools where, who sees what; M = sum of b."""
    mask_T, packing = packed_mask(documents)
    layout = concept_layout(mask_T, packing, align)
    expected = loop_layout(mask_T, packing, align)
    assert layout.packing.cu_seqlens.tolist() == expected["cu_concepts"]
    assert layout.visible_concept_T.tolist() == expected["visible"]
    assert layout.pooled_concept_T.tolist() == expected["pooled"]
    assert layout.boundary_position_M.tolist() == expected["boundaries"]
    assert layout.num_concepts == int(mask_T.sum())
    assert min(layout.packing.lengths) >= 1
    for concept in range(layout.num_concepts):
        assert layout.pooled_count_M[concept] == expected["pooled"].count(concept)
        assert layout.run_length_M[concept] == expected["visible"].count(concept)
        stop, count = int(layout.pool_stop_M[concept]), int(layout.pooled_count_M[concept])
        members = [token for token, pool in enumerate(expected["pooled"]) if pool == concept]
        assert list(range(stop - count, stop)) == members


@pytest.mark.parametrize("align", ALIGNS)
@settings(deadline=None, max_examples=150, derandomize=True)
@given(documents=documents_of_decisions)
def test_segments_partition_each_document(align: str, documents: list[list[bool]]) -> None:
    """Peers' list 14: disjoint, contiguous, ordered; runs cover all tokens; j(phi(m)) = m."""
    mask_T, packing = packed_mask(documents)
    layout = concept_layout(mask_T, packing, align)
    visible_T, pooled_T = layout.visible_concept_T, layout.pooled_concept_T
    assert int(layout.run_length_M.sum()) == packing.num_rows
    assert torch.equal(visible_T[layout.boundary_position_M], torch.arange(layout.num_concepts))
    assert bool((visible_T.diff() >= 0).all())
    held = pooled_T[pooled_T >= 0]
    assert bool((held.diff() >= 0).all())
    assert int(layout.pooled_count_M.sum()) == held.numel()
    # the tokens that no concept holds are the end of their document
    for start, stop in zip(packing.bounds, packing.bounds[1:], strict=False):
        open_tokens = (pooled_T[start:stop] < 0).nonzero().flatten() + start
        last_boundary = int(mask_T[start:stop].nonzero().max()) + start
        first_open = last_boundary + 1 if align == "end" else last_boundary
        assert open_tokens.tolist() == list(range(first_open, stop))
    document_T = packing.document_index()
    concept_document_M = layout.packing.document_index()
    assert torch.equal(concept_document_M[visible_T], document_T)
    assert torch.equal(concept_document_M[held], document_T[pooled_T >= 0])
    is_null_M = layout.packing.position == 0
    assert torch.equal(layout.pooled_count_M == 0, is_null_M & (align == "start_shift"))


def test_an_unfinished_tail_does_not_pool_into_the_next_document() -> None:
    """Peers' list 9: one running count over both documents would put it there."""
    mask_T, packing = packed_mask([[True, True, False, False], [True, False, True]])
    layout = concept_layout(mask_T, packing, "end")
    assert layout.pooled_concept_T.tolist() == [0, 1, -1, -1, 2, 3, 3]
    assert layout.pooled_count_M.tolist() == [1, 1, 1, 2]
    naive_T = mask_T.long().cumsum(0) - mask_T.long()
    assert naive_T[2] == layout.pooled_concept_T[4], "the trap is there"


def loop_mean(hidden_TD: Tensor, layout: ConceptLayout) -> Tensor:
    """Means in fp64, concept by concept."""
    wide = hidden_TD.double()
    mean_MD = torch.zeros(layout.num_concepts, hidden_TD.shape[1], dtype=torch.float64)
    for concept in range(layout.num_concepts):
        members = wide[layout.pooled_concept_T == concept]
        if members.numel():
            mean_MD[concept] = members.sum(0) / len(members)
    return mean_MD


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2**-8)],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 600])
def test_pooling_equals_a_loop_in_fp64(
    length: int, dtype: torch.dtype, tolerance: float, align: str
) -> None:
    """Peers' list 18: within one bf16 ulp; 600 is the whole document but its first token."""
    num_tokens = 601
    packing = packing_from_offsets(torch.tensor([0, num_tokens]), num_tokens)
    mask_T = torch.arange(num_tokens) % length == 0
    layout = concept_layout(mask_T, packing, align)
    assert length in layout.pooled_count_M
    generator = torch.Generator().manual_seed(length)
    hidden_TD = (torch.randn(num_tokens, 8, generator=generator) + 0.5).to(dtype)
    pooled = segment_mean(hidden_TD, layout)
    expected = loop_mean(hidden_TD, layout)
    assert pooled.dtype == dtype
    assert bool(((pooled.double() - expected).abs() <= tolerance * (expected.abs() + 1e-3)).all())


def test_pooling_is_bitwise_deterministic() -> None:
    """Peers' list 19: twenty runs, values and gradients."""
    layout = random_layout(3000, 0.25, "end", num_documents=4)
    generator = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(3000, 16, generator=generator).requires_grad_()
    weight_MD = torch.randn(layout.num_concepts, 16, generator=generator)
    first = segment_mean(hidden_TD, layout)
    (first_gradient,) = torch.autograd.grad((first * weight_MD).sum(), hidden_TD)
    for _ in range(19):
        again = segment_mean(hidden_TD, layout)
        (gradient,) = torch.autograd.grad((again * weight_MD).sum(), hidden_TD)
        assert torch.equal(again, first)
        assert torch.equal(gradient, first_gradient)


@pytest.mark.parametrize("align", ALIGNS)
def test_the_gradient_of_pooling_is_a_gather_divided_by_the_count(align: str) -> None:
    """Peers' list 20: gradcheck, and dh_t = dC[m(t)] / n_m exactly; 0 in open segments."""
    layout = random_layout(17, 0.4, align, num_documents=3, seed=5)
    assert bool((layout.pooled_concept_T < 0).any())
    generator = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(17, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden: segment_mean(hidden, layout), hidden_TD)
    upstream_MD = torch.randn(layout.num_concepts, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(segment_mean(hidden_TD, layout), hidden_TD, upstream_MD)
    share_MD = upstream_MD / layout.pooled_count_M.clamp(min=1).unsqueeze(1)
    held = layout.pooled_concept_T >= 0
    assert torch.equal(gradient[held], share_MD[layout.pooled_concept_T[held]])
    assert not gradient[~held].any()


def running_sum_mean(hidden_TD: Tensor, layout: ConceptLayout) -> Tensor:
    """The tempting way, kept here as a control: differences of running sums."""
    sums = torch.nn.functional.pad(hidden_TD.cumsum(0), (0, 0, 1, 0))
    stops = layout.pooled_count_M.cumsum(0)
    total = sums[stops] - sums[stops - layout.pooled_count_M]
    return total / layout.pooled_count_M.unsqueeze(1)


def test_pooling_loses_no_precision_on_long_documents() -> None:
    """Peers' list 21: the error at 65k tokens is that at 1k; a running sum drifts."""
    errors, drifts = [], []
    for num_tokens in (1024, 65536):
        layout = random_layout(num_tokens, 0.25, "end", seed=3)
        generator = torch.Generator().manual_seed(4)
        hidden_TD = torch.randn(num_tokens, 4, generator=generator) + 1.0
        expected = segment_mean(hidden_TD.double(), layout)
        errors.append(float((segment_mean(hidden_TD, layout) - expected).abs().mean()))
        drifts.append(float((running_sum_mean(hidden_TD, layout) - expected).abs().mean()))
    assert errors[1] < 1.5 * errors[0]
    assert drifts[1] > 20 * drifts[0], "the control must show the drift"


def test_replication_repeats_each_concept_over_its_run() -> None:
    """Peers' list 14: Eq. 17."""
    layout = random_layout(40, 0.3, "end", num_documents=3)
    concept_M = torch.arange(layout.num_concepts)
    expected = concept_M.repeat_interleave(layout.run_length_M)
    assert torch.equal(replicate(concept_M, layout), expected)


@pytest.mark.parametrize("align", ALIGNS)
def test_the_gradient_of_replication_is_the_sum_of_each_run(align: str) -> None:
    """Gradcheck, and a loop; once more for the gradient of the gradient."""
    layout = random_layout(17, 0.4, align, num_documents=3, seed=6)
    generator = torch.Generator().manual_seed(7)
    shape = (layout.num_concepts, 2, 3)
    concept_MKH = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda concept: replicate(concept, layout), concept_MKH)
    assert torch.autograd.gradgradcheck(lambda concept: replicate(concept, layout), concept_MKH)
    upstream_TKH = torch.randn(17, 2, 3, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(replicate(concept_MKH, layout), concept_MKH, upstream_TKH)
    for concept in range(layout.num_concepts):
        expected = upstream_TKH[layout.visible_concept_T == concept].sum(0)
        torch.testing.assert_close(gradient[concept], expected, rtol=1e-14, atol=1e-14)


def test_the_gradient_of_replication_is_summed_in_fp32() -> None:
    """bf16 counts to 256 and stays there; a run of a thousand tokens must count to a thousand."""
    packing = packing_from_offsets(torch.tensor([0, 1000]), 1000)
    layout = concept_layout(packing.position == 0, packing, "end")
    concept_M = torch.ones(1, dtype=torch.bfloat16).requires_grad_()
    replicate(concept_M, layout).sum().backward()
    assert concept_M.grad.dtype == torch.bfloat16
    assert concept_M.grad == 1000


class OpRecorder(TorchDispatchMode):
    """Names of the operations that run below it, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def scattered(self) -> list[str]:
        """Additions that a GPU does in any order."""
        words = ("index_add", "index_put", "scatter", "bincount")
        return [name for name in self.names if any(word in name for word in words)]


@pytest.mark.parametrize("align", ALIGNS)
def test_nothing_is_added_in_an_order_that_a_gpu_chooses(align: str) -> None:
    """Peers' list 19, without a GPU."""
    hidden_TD = torch.randn(60, 4, generator=torch.Generator().manual_seed(8)).requires_grad_()
    with OpRecorder() as recorder:
        layout = random_layout(60, 0.3, align, num_documents=3)
        replicate(segment_mean(hidden_TD, layout), layout).sum().backward()
    assert any("segment_reduce" in name for name in recorder.names)
    assert not recorder.scattered
    with OpRecorder() as control:
        hidden_TD.index_select(0, layout.visible_concept_T).sum().backward()
    assert control.scattered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; a GPU would provide it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("align", ALIGNS)
def test_pooling_and_replication_are_bitwise_deterministic_on_a_gpu(
    align: str, dtype: torch.dtype
) -> None:
    """Peers' list 19: twenty runs, values and gradients, which are those of the CPU."""
    num_tokens = 20_000
    generator = torch.Generator().manual_seed(8)
    offsets = torch.linspace(0, num_tokens, 6).long()
    mask_T = torch.rand(num_tokens, generator=generator) < 0.02
    hidden_TD = torch.randn(num_tokens, 64, generator=generator).to(dtype)
    upstream_TD = torch.randn(num_tokens, 64, generator=generator).to(dtype)

    def run(device: str) -> tuple[Tensor, ...]:
        packing = packing_from_offsets(offsets.to(device), num_tokens)
        layout = concept_layout(mask_T.to(device) | (packing.position == 0), packing, align)
        input_TD = hidden_TD.to(device).requires_grad_()
        pooled_MD = segment_mean(input_TD, layout)
        repeated_TD = replicate(pooled_MD, layout)
        gradients = torch.autograd.grad(repeated_TD, (input_TD, pooled_MD), upstream_TD.to(device))
        return pooled_MD.detach().cpu(), *(part.cpu() for part in gradients)

    first = run("cuda")
    for again in (run("cuda") for _ in range(19)):
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    for pair in zip(first, run("cpu"), strict=True):
        torch.testing.assert_close(*pair)
