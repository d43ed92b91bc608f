"""Parameters and FLOPs per token by formula; the code is in `config`, which needs no torch."""

from __future__ import annotations

from megadlcm.config.accounting import (
    count_parameters,
    dense_control,
    flops_per_token,
    matmul_parameters_per_token,
)

__all__ = ["count_parameters", "dense_control", "flops_per_token", "matmul_parameters_per_token"]
