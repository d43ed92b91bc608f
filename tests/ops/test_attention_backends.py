"""Which attention back-end runs where, and what a user is told who asks for another one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from megadlcm.config.kernels import ATTENTION_BACKENDS, BackendTraits
from megadlcm.model.language_model import attention_backend
from megadlcm.ops import attention
from megadlcm.ops.attention import backend_module, choose_backend
from megadlcm.ops.backends import reference
from megadlcm.training import checks
from megadlcm.training.checks import check_launch
from tests.support.tiny_models import tiny_config
from tests.support.tiny_runs import tiny_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = ("flash_attn", "varlen")
HALF_TYPES = (torch.float16, torch.bfloat16)
MakeGpu = Callable[..., None]


@pytest.fixture
def make_gpu(monkeypatch: pytest.MonkeyPatch) -> MakeGpu:
    """Function(capability, flash, varlen): a machine as `choose_backend` sees it."""

    def make(capability: tuple[int, int] = (9, 0), flash: bool = True, varlen: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        installed = {"flash_attn": flash, "torch.nn.attention.varlen": varlen, "": True}
        monkeypatch.setattr(attention, "is_installed", installed.__getitem__)

    return make


@pytest.mark.parametrize("name", ATTENTION_BACKENDS)
def test_a_back_end_is_a_file_of_its_name_with_two_functions(name: str) -> None:
    """Read without its package, which only a call needs."""
    module = backend_module(name)
    for function in ("attend_documents", "attend_concepts"):
        own = inspect.signature(getattr(module, function)).parameters
        assert len(own) == len(inspect.signature(getattr(reference, function)).parameters)


def test_auto_ends_with_a_back_end_that_runs_anywhere() -> None:
    name, needs = list(ATTENTION_BACKENDS.items())[-1]
    assert needs == BackendTraits(attends_packed=False, kept_operators=needs.kept_operators)
    assert choose_backend(name, CPU, torch.float64, [5]) == name
    assert all(traits.kept_operators for traits in ATTENTION_BACKENDS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_auto_is_the_reference_where_no_kernel_runs(make_gpu: MakeGpu, dtype: torch.dtype) -> None:
    make_gpu()
    assert choose_backend("auto", CPU, dtype, [64]) == "reference"
    if dtype != torch.bfloat16:
        assert choose_backend("auto", CUDA, dtype, [64]) == "reference"
    for device in (CUDA, CPU):
        assert choose_backend("reference", device, dtype, [64]) == "reference"


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_auto_takes_the_fastest_kernel_that_is_installed(
    make_gpu: MakeGpu, dtype: torch.dtype, varlen: bool, flash: bool
) -> None:
    make_gpu(flash=flash, varlen=varlen)
    expected = "flash_attn" if flash else "varlen" if varlen else "reference"
    assert choose_backend("auto", CUDA, dtype, [64]) == expected
    for name, installed in (("flash_attn", flash), ("varlen", varlen)):
        if installed:
            assert choose_backend(name, CUDA, dtype, [64]) == name
        else:
            with pytest.raises(ValueError, match=f"{name} needs its package, which is not inst"):
                choose_backend(name, CUDA, dtype, [64])


@pytest.mark.parametrize(
    ("capability", "head_sizes", "runs"),
    [
        ((8, 0), [64], True),
        ((12, 0), [8, 256], True),
        ((7, 5), [64], False),
        ((9, 0), [264], False),
        ((9, 0), [64, 20], False),
        ((9, 0), [4, 64], False),
    ],
    ids=str,
)
def test_a_kernel_runs_on_gpus_and_head_sizes_that_it_was_written_for(
    make_gpu: MakeGpu, capability: tuple[int, int], head_sizes: list[int], runs: bool
) -> None:
    """Without this `auto` would start a run that its first forward pass ends."""
    make_gpu(capability)
    chosen = choose_backend("auto", CUDA, torch.bfloat16, head_sizes)
    assert chosen == ("flash_attn" if runs else "reference")
    for name in KERNELS:
        if runs:
            assert choose_backend(name, CUDA, torch.bfloat16, head_sizes) == name
        else:
            with pytest.raises(ValueError, match=f"{name} needs"):
                choose_backend(name, CUDA, torch.bfloat16, head_sizes)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("device", "dtype", "capability", "head_sizes", "reason"),
    [
        (CPU, torch.bfloat16, (9, 0), [64], "CUDA (device cpu)"),
        (CUDA, torch.float32, (9, 0), [64], "CUDA and a half-precision type (got float32)"),
        (CUDA, torch.float64, (9, 0), [64], "CUDA and a half-precision type (got float64)"),
        (CUDA, torch.float16, (7, 5), [64], "compute capability 8.0 (this GPU has 7.5)"),
        (CUDA, torch.bfloat16, (9, 0), [64, 260, 12], "multiples of 8 up to 256 (got 12 and 260)"),
    ],
    ids=str,
)
def test_a_named_kernel_that_cannot_run_is_refused_in_one_line(
    make_gpu: MakeGpu,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    head_sizes: list[int],
    reason: str,
) -> None:
    """The message says what is wanted, what is there and what to write instead."""
    make_gpu(capability)
    with pytest.raises(ValueError) as error:
        choose_backend(name, device, dtype, head_sizes)
    message = str(error.value)
    assert message.startswith(f"model.attention_backend={name} needs ")
    assert reason in message
    assert message.endswith("choose auto or reference")
    assert "\n" not in message


def test_a_model_asks_for_the_head_sizes_of_both_of_its_widths(make_gpu: MakeGpu) -> None:
    """The dense control has no backbone: what its config says of concepts does not count."""
    make_gpu()
    fits = {"d_token": 64, "token_heads": 4, "d_concept": 96, "concept_heads": 6}
    wide_concepts = fits | {"d_concept": 528, "concept_heads": 2, "concept_kv_heads": 1}
    odd_tokens = fits | {"d_token": 48}
    for options, expected in (
        (fits, "flash_attn"),
        (wide_concepts, "reference"),
        (odd_tokens, "reference"),
        (wide_concepts | {"architecture": "dense"}, "flash_attn"),
    ):
        assert attention_backend(tiny_config(**options), CUDA, torch.bfloat16) == expected


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "this GPU has 7.5"), ((9, 0), "multiples of 8 up to 256 (got 4)")],
    ids=str,
)
def test_a_run_with_a_kernel_that_cannot_run_ends_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
    make_gpu: MakeGpu,
    tmp_path: Path,
    capability: tuple[int, int],
    reason: str,
) -> None:
    make_gpu(capability)
    monkeypatch.setattr(checks, "choose_device", lambda _launch: CUDA)
    kernel, auto = (
        tiny_run(
            tmp_path,
            tmp_path / "run",
            training={"precision": "bf16"},
            model={"attention_backend": backend, "token_heads": 4},
        )
        for backend in ("varlen", "auto")
    )
    with pytest.raises(InputError) as error:
        check_launch(kernel)
    assert reason in str(error.value) and "\n" not in str(error.value)
    check_launch(auto)
