from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megadlcm.config import RunConfig
from megadlcm.plan.accounting import flops_per_token
from megadlcm.training import throughput
from megadlcm.training.throughput import (
    peak_flops,
    peak_memory_bytes,
    training_flops_per_token,
)

MakeRun = Callable[..., RunConfig]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_given_peak_has_precedence(make_run: MakeRun) -> None:
    assert peak_flops(make_run(logging={"peak_tflops": 2.5}), CPU) == 2.5e12


def test_the_peak_of_a_cpu_is_measured(make_run: MakeRun) -> None:
    assert 1e6 < peak_flops(make_run(logging={"peak_tflops": None}), CPU) < 1e15


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("Some Other Card", "bf16", 1.0),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets_or_measured(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: str,
    peak: float,
) -> None:
    monkeypatch.setattr(throughput, "measure_matmul_flops", lambda device, dtype: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = make_run(logging={"peak_tflops": None}, training={"precision": precision})
    assert peak_flops(config, GPU) == peak


def test_training_takes_three_forward_passes_and_recomputation_does_not_count(
    make_run: MakeRun,
) -> None:
    config = make_run()
    forward = flops_per_token(config.model, config.data.seq_len, 4.0)["total"]
    assert training_flops_per_token(config, 4.0) == 3 * forward > 0
    recomputed = make_run(parallel={"recompute": "block"})
    assert training_flops_per_token(recomputed, 4.0) == training_flops_per_token(config, 4.0)


def test_more_concepts_cost_more(make_run: MakeRun) -> None:
    config = make_run()
    costs = [training_flops_per_token(config, ratio) for ratio in (1.0, 2.0, 4.0, 8.0)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    dense = make_run(model={"architecture": "dense"})
    assert training_flops_per_token(dense, None) > 0


def test_memory_is_that_of_this_process_in_bytes() -> None:
    assert 1e7 < peak_memory_bytes(CPU) < 1e12
