"""Tokens per second and the share of the hardware's peak that the model's arithmetic reaches."""

from __future__ import annotations

import resource
import time

import torch

from megadlcm.config import RunConfig
from megadlcm.model.accounting import flops_per_token

TRAINING_PASSES = 3
"""Forward once, backward twice; work that is repeated by recomputation does not count."""

# dense peak of one device, TFLOP/s: (bf16, fp32 without TF32), from the makers' data sheets
_GPU_PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "B200": (2250.0, 80.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "V100": (125.0, 15.7),
}
_MATRIX_SIZE = 1024
_REPETITIONS = 5


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Peak of one device in FLOP/s.

    Args:
        config: the run; `logging.peak_tflops` has precedence.
        device: the device.

    Returns:
        The given peak; else the data sheet's for a known GPU; on a CPU the best of a few fp32
        matrix products, measured now; None for an unknown GPU.
    """
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * 1e12
    if device.type == "cpu":
        return measure_matmul_flops()
    name = torch.cuda.get_device_name(device)
    for known, (bf16, fp32) in _GPU_PEAK_TFLOPS.items():
        if known in name:
            return (bf16 if config.training.precision == "bf16" else fp32) * 1e12
    return None


def measure_matmul_flops() -> float:
    """Best rate of fp32 matrix products on this CPU with the threads that torch uses, FLOP/s."""
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE)
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 2.0 * _MATRIX_SIZE**3 / best


def training_flops_per_token(config: RunConfig, tokens_per_concept: float | None) -> float:
    """FLOPs of one training token by formula, three times the forward pass.

    Args:
        config: the run.
        tokens_per_concept: realised ratio; None for the dense control.

    Returns:
        FLOPs.
    """
    forward = flops_per_token(config.model, config.data.seq_len, tokens_per_concept)
    return TRAINING_PASSES * forward["total"]


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
