"""The formulas reproduce the paper's table, and the real model part by part."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from megadlcm.config import ModelConfig
from megadlcm.model import build_model
from megadlcm.plan.accounting import (
    count_parameters,
    dense_control,
    flops_per_token,
    matmul_parameters_per_token,
)
from tests.support.tiny_models import tiny_config

DLCM = ModelConfig(
    vocab_size=128_815,
    d_token=1536,
    d_concept=3072,
    encoder_layers=10,
    backbone_layers=16,
    decoder_layers=6,
    token_heads=24,
    token_kv_heads=12,
    concept_heads=48,
    concept_kv_heads=24,
    token_ffn_size=6144,
    concept_ffn_size=6144,
)
DENSE = dense_control(DLCM)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boundary_mode": "rule"},
        {"boundary_mode": "fixed"},
        {"boundary_mode": "ema_ste"},
        {"boundary_mode": "learned_local", "boundary_size": 8},
        {"segment_align": "start_shift"},
        {"self_attention_qk_norm": True},
        {"token_kv_heads": 4, "concept_kv_heads": 1},
        {"encoder_layers": 1, "backbone_layers": 4, "decoder_layers": 3},
        {"architecture": "dense"},
        {"architecture": "dense", "self_attention_qk_norm": True, "segment_align": "start_shift"},
    ],
)
def test_every_part_has_as_many_parameters_as_the_real_model(options: dict[str, Any]) -> None:
    config = tiny_config(**options)
    real = Counter[str]()
    for name, parameter in build_model(config, device="meta").named_parameters():
        real[name.partition(".")[0]] += parameter.numel()
    counted = count_parameters(config)
    assert counted.pop("total") == real.total()
    assert {name: count for name, count in counted.items() if count} == dict(real)


@pytest.mark.parametrize(("config", "millions"), [(DLCM, 2339.9), (DENSE, 1301.8)])
def test_the_large_models_have_the_stated_number_of_parameters(
    config: ModelConfig, millions: float
) -> None:
    real = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
    assert count_parameters(config)["total"] == real
    assert real / 1e6 == pytest.approx(millions, abs=0.1)


def test_the_control_of_the_papers_model_is_the_papers_baseline() -> None:
    assert (DENSE.num_layers, DENSE.token_ffn_size, DENSE.token_kv_heads) == (32, 4096, 24)


def test_matrix_elements_per_token_match_the_dense_baseline() -> None:
    dlcm = matmul_parameters_per_token(DLCM)["total"]
    dense = matmul_parameters_per_token(DENSE)["total"]
    assert dlcm / 1e6 == pytest.approx(1115.6, abs=0.05)
    assert dense / 1e6 == pytest.approx(1103.8, abs=0.05)
    assert dlcm / dense == pytest.approx(1.011, abs=5e-4)


@pytest.mark.parametrize(("ratio", "expected"), [(2, 1.32), (3.15, 1.09), (3.92, 1.02), (8, 0.86)])
def test_compute_follows_the_realised_ratio(ratio: float, expected: float) -> None:
    dlcm = matmul_parameters_per_token(DLCM, ratio)["total"]
    assert dlcm / matmul_parameters_per_token(DENSE)["total"] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(("seq_len", "expected"), [(2048, 0.976), (8192, 0.899)])
def test_attention_maps_favour_the_concept_model(seq_len: int, expected: float) -> None:
    dlcm, dense = (flops_per_token(config, seq_len)["total"] for config in (DLCM, DENSE))
    assert dlcm / dense == pytest.approx(expected, abs=5e-4)


def test_the_target_ratio_is_the_default_and_the_total_is_the_sum() -> None:
    parts = flops_per_token(DLCM, 2048)
    assert parts == flops_per_token(DLCM, 2048, DLCM.target_tokens_per_concept)
    assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"])
    other = dataclasses.replace(DLCM, target_tokens_per_concept=2.0)
    assert flops_per_token(other, 2048)["total"] > parts["total"]


def test_the_dense_model_ignores_the_ratio() -> None:
    assert flops_per_token(DENSE, 512, 2.0) == flops_per_token(DENSE, 512, 8.0)
