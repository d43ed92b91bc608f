"""The memory formula agrees with what torch keeps, and ZeRO divides what it should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig, load_config
from megadlcm.config.accounting import count_parameters
from megadlcm.config.memory import activation_bytes, estimate_memory
from megadlcm.model import build_model

NUM_TOKENS = 256


def kept_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes of distinct storages that autograd keeps, without the weights; and the concepts."""
    model = build_model(config.model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor
        return tensor

    tokens_T = torch.arange(NUM_TOKENS) % config.model.vocab_size
    cu_seqlens = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens_T, cu_seqlens)
    num_concepts = output.layout.num_concepts if output.layout else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), num_concepts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_token": 64, "token_ffn_size": 256},
        {"encoder_layers": 8},
        {"self_attention_qk_norm": True},
        {"architecture": "dense"},
    ],
)
def test_activations_are_what_autograd_keeps(run_file: Path, options: dict[str, Any]) -> None:
    config = load_config(run_file, ["model.vocab_size=8"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **options))
    measured, num_concepts = kept_bytes(config)
    assert activation_bytes(config, NUM_TOKENS, num_concepts) == pytest.approx(measured, rel=0.15)


def test_recomputation_keeps_less_and_more_concepts_keep_more(run_file: Path) -> None:
    config = load_config(run_file, ["model.encoder_layers=8"])
    recomputed = load_config(run_file, ["model.encoder_layers=8", "parallel.recompute=block"])
    plain = activation_bytes(config, 1024, 256)
    assert activation_bytes(recomputed, 1024, 256) < plain < activation_bytes(config, 1024, 1024)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(0, (4, 4, 8)), (1, (4, 4, 3)), (2, (4, 1, 3)), (3, (1, 1, 3))],
)
def test_each_zero_stage_divides_one_more_part(
    run_file: Path, stage: int, bytes_per_parameter: tuple[int, int, int]
) -> None:
    config = load_config(run_file, [f"parallel.zero_stage={stage}"])
    memory = estimate_memory(config, data_parallel_size=4)
    num_parameters = count_parameters(config.model)["total"]
    found = (memory.parameters, memory.gradients, memory.optimizer)
    assert found == tuple(num_parameters * size for size in bytes_per_parameter)


def test_half_precision_halves_the_weights_and_sgd_keeps_no_moments(run_file: Path) -> None:
    config = load_config(run_file, ["training.precision=bf16", "optimizer.name=sgd"])
    memory = estimate_memory(config, data_parallel_size=1)
    num_parameters = count_parameters(config.model)["total"]
    assert (memory.parameters, memory.optimizer) == (2 * num_parameters, 4 * num_parameters)
    assert memory.total_worst > memory.total
