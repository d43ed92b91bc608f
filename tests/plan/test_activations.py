"""The formula of activations agrees with what autograd keeps, unit by unit, and with the peak."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig, load_config
from megadlcm.config.anatomy import UnitId, UnitKind
from megadlcm.model import LanguageModel
from megadlcm.ops.backends import varlen
from megadlcm.parallel.partition import build_stage_model
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.activations import rotation_bytes, unit_activation_bytes
from megadlcm.plan.memory import activation_bytes
from tests.support.distributed import run_distributed
from tests.support.memory_probe import Measured, measure_peak, measure_units

SEQ_LEN = 128
LENGTHS = [SEQ_LEN] * 3  # as long as the formula supposes for the mask from tokens to concepts
KEPT_TOLERANCE = 0.01
PEAK_TOLERANCE = 0.025
VARIANTS: list[dict[str, Any]] = [
    {},
    {"token_ffn_size": 512, "encoder_layers": 3, "token_kv_heads": 4},
    {"d_concept": 192, "concept_ffn_size": 96, "concept_heads": 6},
    {"self_attention_qk_norm": True, "cross_attention_rope": False},
    {"boundary_mode": "ema_ste"},
    {"boundary_mode": "rule", "segment_align": "start_shift"},
    {"boundary_mode": "fixed"},
    {"smoothing": "none", "concept_weighting": "uniform"},
    {"boundary_size": 8, "ratio_loss_detach_hidden": True},
    {"architecture": "dense"},
]


def run_of(run_file: Path, model: dict[str, Any], *overrides: str) -> RunConfig:
    """The small run with another model."""
    config = load_config(run_file, [f"data.seq_len={SEQ_LEN}", *overrides])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def expected_units(config: RunConfig, measured: Measured, on_gpu: bool) -> dict[UnitId, float]:
    """The formula for each unit; the first block of a stack also keeps the rotations."""
    rows, seen, expected = (measured.num_tokens, measured.num_concepts), set(), {}
    for unit in measured.units:
        expected[unit] = unit_activation_bytes(config, unit.kind, *rows, on_gpu)
        if unit.kind not in seen:
            expected[unit] += rotation_bytes(config, unit.kind, *rows)
        seen.add(unit.kind)
    return expected


def check_units(config: RunConfig, measured: Measured, on_gpu: bool) -> None:
    """Every unit agrees to one per cent, or a few numbers."""
    expected = expected_units(config, measured, on_gpu)
    for unit, found in measured.units.items():
        assert expected[unit] == pytest.approx(found, rel=KEPT_TOLERANCE, abs=64), unit.name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: "-".join(map(str, model)) or "plain")
def test_each_unit_keeps_what_the_formula_says(
    run_file: Path, model: dict[str, Any], precision: str
) -> None:
    config = run_of(run_file, model, f"training.precision={precision}")
    check_units(config, measure_units(config, LENGTHS), on_gpu=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputation_keeps_what_the_formula_says(
    run_file: Path, recompute: str, precision: str
) -> None:
    """And not what the formula says of another mode."""
    overrides = (f"training.precision={precision}", f"parallel.recompute={recompute}")
    config = run_of(run_file, {"self_attention_qk_norm": True}, *overrides)
    measured = measure_units(config, LENGTHS)
    check_units(config, measured, on_gpu=False)
    for other in {"none", "selective", "block"} - {recompute}:
        parallel = dataclasses.replace(config.parallel, recompute=other)
        with pytest.raises(AssertionError):
            check_units(dataclasses.replace(config, parallel=parallel), measured, on_gpu=False)


def test_uneven_documents_keep_no_more_than_the_formula_says(run_file: Path) -> None:
    """Only the mask depends on the lengths, and is counted for the longest."""
    config = run_of(run_file, {})
    measured = measure_units(config, [100, 5, 128, 1, 60])
    expected = expected_units(config, measured, on_gpu=False)
    unit = UnitId(UnitKind.CONCEPT_READER)
    reader = (measured.units.pop(unit), expected.pop(unit))
    assert reader[0] < reader[1] < 1.1 * reader[0]
    assert sum(expected.values()) == pytest.approx(sum(measured.units.values()), rel=0.001)


class _OneKernelNorm(torch.autograd.Function):
    """Keeps what the kernel of a GPU keeps: input, scale and gain."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = states.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(states, scale, gain)
        return (wide * scale * gain.float()).to(states.dtype)


class _VariableLengthKernel(torch.autograd.Function):
    """Keeps what such a kernel keeps: queries, keys, values, result, logarithms of the sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.clone()
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_kernels_of_a_gpu_keep_less(
    run_file: Path, precision: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins that keep the same tensors, because no such kernel runs on a CPU."""

    def norm(states: Tensor, _: Any, gain: Tensor, eps: float) -> Tensor:
        normed: Tensor = _OneKernelNorm.apply(states, gain, eps)
        return normed

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Any) -> Tensor:
        attended: Tensor = _VariableLengthKernel.apply(query, key, value)
        return attended

    monkeypatch.setattr(torch.nn.functional, "rms_norm", norm)
    monkeypatch.setattr(varlen, "attend_documents", attend)
    if precision == "bf16":
        monkeypatch.setattr(LanguageModel, "backend", lambda _: "varlen")
    overrides = (f"training.precision={precision}", f"parallel.recompute={recompute}")
    config = run_of(run_file, {"self_attention_qk_norm": True}, *overrides)
    measured = measure_units(config, LENGTHS)
    check_units(config, measured, on_gpu=True)
    with pytest.raises(AssertionError):
        check_units(config, measured, on_gpu=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize(
    "model",
    [
        {"vocab_size": 8},  # the last block is the worst moment
        {"vocab_size": 2048},  # the head is
        {"vocab_size": 8, "concept_ffn_size": 1024},  # a block of concepts may be
        {"architecture": "dense"},
    ],
    ids=["decoder", "head", "backbone", "dense"],
)
def test_the_peak_of_a_step_is_what_the_formula_says(
    run_file: Path, model: dict[str, Any], recompute: str, precision: str
) -> None:
    overrides = (f"training.precision={precision}", f"parallel.recompute={recompute}")
    config = run_of(run_file, model, *overrides)
    peak, num_concepts = measure_peak(config, LENGTHS)
    estimate = activation_bytes(config, sum(LENGTHS), num_concepts, on_gpu=False)
    assert estimate == pytest.approx(peak, rel=PEAK_TOLERANCE)


def split_measures(configs: list[RunConfig]) -> list[Measured]:
    """What this process keeps of split models."""
    return [
        measure_units(
            config, LENGTHS, build_stage_model(config, join_process_group(config.parallel))
        )
        for config in configs
    ]


@pytest.mark.slow
def test_split_layers_and_rows_keep_their_share(run_file: Path) -> None:
    configs = [
        run_of(
            run_file,
            {"self_attention_qk_norm": True},
            "parallel.tensor_parallel_size=2",
            f"parallel.sequence_parallel={rows}",
            f"parallel.recompute={recompute}",
            f"training.precision={precision}",
        )
        for rows, recompute, precision in (
            ("false", "none", "bf16"),
            ("true", "none", "fp32"),
            ("true", "selective", "bf16"),
        )
    ]
    for of_rank in run_distributed(split_measures, 2, configs):
        for config, measured in zip(configs, of_rank, strict=True):
            check_units(config, measured, on_gpu=False)
            parallel = dataclasses.replace(config.parallel, sequence_parallel=False)
            if config.parallel.sequence_parallel:
                with pytest.raises(AssertionError):
                    check_units(dataclasses.replace(config, parallel=parallel), measured, False)
