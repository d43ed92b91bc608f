"""How often a forward pass makes the host wait for the device (peers' list 49)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from megadlcm.model import build_model
from megadlcm.ops.boundary import BoundarySampling
from tests.support.tiny_models import (
    VARIANTS,
    pack,
    random_documents,
    tiny_config,
    tiny_model,
    variant_name,
)

LENGTHS = (9, 1, 14, 6)
# every mode, alignment and weighting
SOME_VARIANTS = [*VARIANTS[::7], {"boundary_mode": "rule"}, {"max_segment_tokens": 3}]


@pytest.mark.parametrize("options", SOME_VARIANTS, ids=variant_name)
def test_a_step_asks_for_the_documents_and_for_the_concepts_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Fake tensors have no values: whatever else asks for one is an error."""
    tokens_T, cu_seqlens = pack(random_documents(LENGTHS, seed=41))
    layout = tiny_model(training=True, **options)(tokens_T, cu_seqlens).layout
    answers = [cu_seqlens.tolist(), list(layout.packing.bounds)]
    asked: list[torch.Size] = []

    def tolist(offsets: Tensor) -> list[int]:
        asked.append(offsets.shape)
        return answers[len(asked) - 1]

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    with FakeTensorMode() as fake:
        model = build_model(tiny_config(**options)).train()
        tokens_T, cu_seqlens = fake.from_tensor(tokens_T), fake.from_tensor(cu_seqlens)
        sampling = BoundarySampling(0, 0, token_index_T=torch.arange(tokens_T.numel()))
        model(tokens_T, cu_seqlens, sampling).logits_TV.sum().backward()
    assert asked == [cu_seqlens.shape, cu_seqlens.shape]
    assert isinstance(model.lm_head.weight.grad, FakeTensor)


def test_fake_tensors_refuse_to_give_a_value() -> None:
    """The control of the test above."""
    with FakeTensorMode() as fake:
        numbers = fake.from_tensor(torch.tensor([1, 2]))
        asking: list[Callable[[], object]] = [
            lambda: int(numbers[0]),
            lambda: bool(numbers.any()),
            lambda: torch.bincount(numbers),
            lambda: numbers[numbers > 0],
            lambda: numbers.repeat_interleave(numbers),
        ]
        for ask in asking:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                ask()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; a GPU would provide it")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gpu_waits_twice(backend: str) -> None:
    """The same, counted by CUDA."""
    config = tiny_config(attention_backend=backend, d_token=64, d_concept=96)
    model = build_model(config, device="cuda").to(torch.bfloat16).train()
    tokens_T, cu_seqlens = (part.cuda() for part in pack(random_documents(LENGTHS, seed=41)))
    index_T = torch.arange(tokens_T.numel(), device="cuda")
    sampling = BoundarySampling(0, 0, token_index_T=index_T)
    model(tokens_T, cu_seqlens, sampling).logits_TV.sum().backward()  # libraries are loaded
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(tokens_T, cu_seqlens, sampling).logits_TV.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(one.message) for one in caught) == 2
