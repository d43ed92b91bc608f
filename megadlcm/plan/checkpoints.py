"""What the checkpoints of a run weigh, and how often they are best written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadlcm.config import RunConfig
from megadlcm.config.constants import FP32_BYTES
from megadlcm.config.training import OPTIMIZERS
from megadlcm.plan.accounting import count_parameters
from megadlcm.plan.layout import Hardware, StagePlan

_COPY_GB = 10.0
"""What a process copies to the memory of its host, GB/s: the stall of an asynchronous save."""
_BREATH = 1.25
"""Saves follow each other no closer than so many times what one takes."""


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of a run on some hardware."""

    total_bytes: float
    """Of one checkpoint: fp32 masters and optimizer state, each element once."""
    process_bytes: float
    """What the process with the most of it writes."""
    imbalance: float
    """That over the mean."""
    staging_node_bytes: float
    """Host memory of a node that holds copies for asynchronous saves; 0 without them."""
    save_seconds: float
    """At the write bandwidth."""
    stall_seconds: float
    """For which training waits at each."""
    interval_seconds: float | None
    """Between saves that lose the least time; None where no failure rate is stated."""
    interval_steps: int | None
    """The same in steps; None where the time of a step is not known, too."""
    loss_seconds: float | None
    """Of work that a failure costs on the average with that interval, beside the restart."""


def plan_checkpoints(
    config: RunConfig, hardware: Hardware, stages: Sequence[StagePlan], step_seconds: float | None
) -> CheckpointPlan:
    """Plans the checkpoints of a run.

    A save costs s seconds of stall every t, a failure every M loses t / 2 of work:
    t = sqrt(2 s M) loses the least (Young 1974), but never less than a save takes.

    Args:
        config: the run.
        hardware: the machines; how fast they write, and how often the run fails.
        stages: parameters of each pipeline stage, before tensor parallelism.
        step_seconds: of a step; None where it is not known.
    """
    moments = OPTIMIZERS[config.optimizer.name].num_moments
    bytes_each = FP32_BYTES * (1 + moments)
    total = float(count_parameters(config.model)["total"] * bytes_each)
    # replicas and tensor parallel processes of a stage share out what it holds
    processes = hardware.world_size / len(stages)
    largest = max(stage.parameters for stage in stages) * bytes_each / processes
    is_async = config.checkpoint.asynchronous
    save_seconds = total / (hardware.write_gb * hardware.num_nodes * 1e9)
    stall = largest / (_COPY_GB * 1e9) if is_async else save_seconds
    interval = None
    if hardware.failure_hours is not None:
        best = math.sqrt(2.0 * stall * 3600.0 * hardware.failure_hours)
        interval = max(_BREATH * save_seconds, best)
    steps = None
    if interval is not None and step_seconds is not None:
        steps = max(1, math.ceil(interval / step_seconds))
    return CheckpointPlan(
        total_bytes=total,
        process_bytes=largest,
        imbalance=largest * hardware.world_size / total,
        staging_node_bytes=largest * hardware.gpus_per_node if is_async else 0.0,
        save_seconds=save_seconds,
        stall_seconds=stall,
        interval_seconds=interval,
        interval_steps=steps,
        loss_seconds=None if interval is None else interval / 2.0,
    )
