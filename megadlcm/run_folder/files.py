"""Names of what lies in a run folder; every reader and writer takes them from here."""

from __future__ import annotations

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"
EVENTS = "events.jsonl"
OWNER = "owner.json"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
LOGS = "logs"
SKIPPED = "skipped"

# in a checkpoint folder
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
LATEST = "latest"

BOUNDARY_MARK = "\u2502"
"""What stands before each concept in a sample text."""


STEP_PATTERN = r"step_(\d{10})"
"""What `step_name` makes."""


def step_name(step: int) -> str:
    """What belongs to a step, `step_0000000100`: a checkpoint folder, a sample text."""
    return f"step_{step:010d}"


def rank_log(rank: int) -> str:
    """Name of the log of a process."""
    return f"rank_{rank:04d}.log"
