"""What a server imports before it forks the ranks of a benchmark."""

from __future__ import annotations

import gc

import megadlcm.training.pretrain  # noqa: F401
from megadlcm.engine.engine import import_deepspeed

import_deepspeed()
gc.collect()
gc.freeze()
