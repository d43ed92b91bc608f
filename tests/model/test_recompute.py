"""Recomputation changes what is kept, and no bit of what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadlcm.model.transformer import Stack, StackShape
from megadlcm.ops.packing import packing_from_offsets

MODES = ("none", "selective", "block")
SHAPES = {
    "token": StackShape(2, 32, 4, 2, 48, 1e-5, 1e4, False),
    "concept": StackShape(2, 64, 8, 4, 96, 1e-5, 1e4, True),
}
ROWS = 48


class Counter(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.products += name in ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
        self.attention += "_scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def run(mode: str, shape: StackShape, dtype: torch.dtype) -> tuple[list[Tensor], Counter, int]:
    """Output and gradients, what the backward pass executed, bytes that the forward pass kept."""
    torch.manual_seed(3)
    stack = Stack(shape).to(dtype)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stack.recompute = mode
    packing = packing_from_offsets(torch.tensor([0, 5, 30, ROWS], dtype=torch.int32), ROWS)
    states_TD = torch.randn(ROWS, shape.width).to(dtype).requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output_TD = stack(states_TD, packing, "reference")
    counter = Counter()
    with counter:
        output_TD.square().sum().backward()
    gradients = [states_TD.grad, *(parameter.grad for parameter in stack.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [output_TD.detach(), *gradients], counter, sum(kept.values())  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_every_mode_computes_the_same_bits(mode: str, shape: str, dtype: torch.dtype) -> None:
    expected, _, _ = run("none", SHAPES[shape], dtype)
    found, _, _ = run(mode, SHAPES[shape], dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(float(value.abs().sum()) > 0 for value in expected)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_selective_repeats_no_product_and_block_repeats_all(shape: str) -> None:
    counters = {mode: run(mode, SHAPES[shape], torch.float32)[1] for mode in MODES}
    # of the seven products of a block the last is not needed again, and torch stops before it
    repeated = 6 * SHAPES[shape].num_layers
    assert counters["selective"].products == counters["none"].products > 0
    assert counters["block"].products == counters["none"].products + repeated
    assert counters["selective"].attention == counters["none"].attention == 0
    assert counters["block"].attention > 0


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_less_is_kept_from_mode_to_mode(shape: str) -> None:
    kept = {mode: run(mode, SHAPES[shape], torch.float32)[2] for mode in MODES}
    assert kept["block"] < kept["none"] / 4
    # selective contexts keep what they store outside of autograd's saved tensors
    assert kept["selective"] < kept["none"]
