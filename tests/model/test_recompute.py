"""Recomputation changes what is kept, and no bit of what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadlcm.config import RunConfig
from megadlcm.model.transformer import Stack, StackShape
from megadlcm.ops.backends import varlen
from megadlcm.ops.packing import packing_from_offsets
from megadlcm.parallel.partition import build_stage_model
from megadlcm.parallel.process_group import join_process_group
from tests.support.distributed import run_distributed
from tests.support.tiny_runs import tiny_run

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
    return [output_TD.detach(), *gradients], counter, sum(kept.values())


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


def stand_in_kernel(library: str) -> tuple[Any, list[int]]:
    """An attention kernel that is one registered operator, as on a GPU; and its calls."""
    calls: list[int] = []

    @torch.library.custom_op(f"{library}::_stand_in", mutates_args=())
    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(1)
        repeats = query.shape[1] // key.shape[1]
        return query * (key * value).repeat_interleave(repeats, dim=1)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    kernel.register_autograd(backward, setup_context=setup)
    return kernel, calls


@pytest.mark.parametrize(("library", "is_repeated"), [("flash_attn", False), ("another", True)])
def test_kernels_of_attention_libraries_run_once(
    library: str, is_repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are operators of their own, which are known by the library that registers them."""
    kernel, calls = stand_in_kernel(library)
    monkeypatch.setattr(varlen, "attend_documents", lambda q, k, v, packing: kernel(q, k, v))
    shape, counts = SHAPES["token"], {}
    packing = packing_from_offsets(torch.tensor([0, ROWS], dtype=torch.int32), ROWS)
    for mode in MODES:
        torch.manual_seed(3)
        stack = Stack(shape)
        for parameter in stack.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        stack.recompute = mode
        calls.clear()
        states_TD = torch.randn(ROWS, shape.width, requires_grad=True)
        stack(states_TD, packing, "varlen").square().sum().backward()
        counts[mode] = len(calls)
    assert counts["none"] == shape.num_layers
    assert counts["block"] == 2 * shape.num_layers
    assert counts["selective"] == counts["block" if is_repeated else "none"]


def split_gradients(configs: list[RunConfig]) -> list[dict[str, Tensor]]:
    """Gradients of this process's part of a model, for each run."""
    found = []
    for config in configs:
        model = build_stage_model(config, join_process_group(config.parallel)).train()
        model = model.bfloat16() if config.training.precision == "bf16" else model
        model.set_recompute(config.parallel.recompute)
        tokens_T = torch.arange(101).mul(37).remainder(config.model.vocab_size)
        output = model(tokens_T, torch.tensor([0, 30, 37, 101], dtype=torch.int32))
        output.token_losses(tokens_T).sum().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        found.append({name: grad for name, grad in gradients.items() if grad is not None})
    return found


def test_sums_over_processes_are_repeated_without_changing_a_bit(tmp_path: Path) -> None:
    """What a product made is kept while the sum over processes writes in place: not into it."""
    variants = [(p, rows) for p in ("fp32", "bf16") for rows in (False, True)]
    configs = [
        tiny_run(
            tmp_path,
            tmp_path / "run",
            model={"token_kv_heads": 2, "concept_kv_heads": 2},
            parallel={
                "tensor_parallel_size": 2,
                "sequence_parallel": rows,
                "recompute": mode,
            },
            training={"precision": precision},
        )
        for precision, rows in variants
        for mode in MODES
    ]
    for of_rank in run_distributed(split_gradients, 2, configs):
        for start in range(0, len(configs), len(MODES)):
            none, *others = of_rank[start : start + len(MODES)]
            assert any(float(grad.abs().sum()) > 0 for grad in none.values())
            for other in others:
                assert none.keys() == other.keys()
                assert all(torch.equal(none[name], other[name]) for name in none)
