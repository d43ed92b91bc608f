"""Numbers that several rooms must agree on and none of them owns. Stdlib only."""

from __future__ import annotations

BF16_BYTES = 2
FP32_BYTES = 4
FP64_BYTES = 8
INT64_BYTES = 8
GIB = 2.0**30

BUCKET_ELEMENTS = 50_000_000
"""Gradients and weights that are communicated at once; DeepSpeed's default would allocate 2 GB."""
SMOOTHING_CHUNK = 64
"""Concepts that one matrix product smooths; decides what the smoothing keeps for backward."""
