"""Tokens per second and the share of the hardware's peak that the model's arithmetic reaches."""

from __future__ import annotations

import resource
import time

import torch

from megadlcm.config import RunConfig
from megadlcm.plan.accounting import TRAINING_PASSES, flops_per_token

# dense peak of one device, TFLOP/s: (bf16, fp32 without TF32), from the makers' data sheets; the
# first name that a device's name contains holds
_GPU_PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
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


def peak_flops(config: RunConfig, device: torch.device) -> float:
    """Peak of one device in FLOP/s.

    Args:
        config: the run; `logging.peak_tflops` has precedence.
        device: the device.

    Returns:
        The given peak; else the data sheet's for a known GPU; on a CPU and on another GPU the best
        of a few matrix products, measured now.
    """
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * 1e12
    half = config.training.precision == "bf16"
    # a CPU's data sheet says little about the threads that this process got
    if device.type == "cpu":
        return measure_matmul_flops(device, torch.float32)
    name = torch.cuda.get_device_name(device)
    for known, (bf16, fp32) in _GPU_PEAK_TFLOPS.items():
        if known in name:
            return (bf16 if half else fp32) * 1e12
    return measure_matmul_flops(device, torch.bfloat16 if half else torch.float32)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of matrix products on a device, with the threads that torch uses, FLOP/s.

    Args:
        device: the device.
        dtype: type of the matrices.

    Returns:
        FLOP/s; below the peak of a data sheet.
    """
    size = _MATRIX_SIZE if device.type == "cpu" else 8 * _MATRIX_SIZE
    # ones: denormal numbers would slow it down, and random ones would draw from the generator
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_REPETITIONS):
        start = _synchronized_time(device)
        torch.mm(matrix, matrix)
        # the best and not the mean: what else runs on the machine only makes it slower
        best = min(best, _synchronized_time(device) - start)
    return 2.0 * size**3 / best


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
