"""The row of a training step, and where rows go: to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megadlcm.config import RunConfig
from megadlcm.engine.objective import StepSummary
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import StepResult
from megadlcm.ops.compression import ratio_loss
from megadlcm.run_folder import files
from megadlcm.run_folder.rows import Row, RowFile
from megadlcm.training.tensorboard import TensorBoard


def concept_entries(summary: StepSummary, config: RunConfig) -> dict[str, float]:
    """Entries of a row that describe the concepts of a step; empty for the dense control."""
    if config.model.architecture != "dlcm":
        return {}
    fraction, prob = summary.boundary_fraction, summary.mean_boundary_prob
    # of the step's F and G, as the objective has it; a mean over micro-batches is another number
    ratio = ratio_loss(
        torch.tensor(fraction, dtype=torch.float64),
        torch.tensor(prob, dtype=torch.float64),
        config.model.target_tokens_per_concept,
    )
    return {
        "ratio_loss": float(ratio),
        "tokens_per_concept": summary.num_tokens / summary.num_boundaries,
        "tokens_per_concept_threshold": summary.num_tokens / summary.num_threshold_boundaries,
        "boundary_fraction": fraction,
        "mean_boundary_prob": prob,
        "near_half_fraction": summary.num_near_half / summary.num_tokens,
    }


def step_row(
    result: StepResult,
    state: TrainState,
    config: RunConfig,
    *,
    learning_rates: dict[str, float],
    timing: dict[str, float],
    digest: str,
    world_size: int,
) -> dict[str, Any]:
    """Collects the row of a training step.

    Args:
        result: sums and norms of the step.
        state: counters after the step.
        config: the run.
        learning_rates: rate in this step of each muP group that has one.
        timing: throughput, seconds and memory.
        digest: digest of the global batch.
        world_size: processes of the run.

    Returns:
        The row, JSON-able.
    """
    step_size = result.boundary_step_size
    # its own key: it is no rate of AdamW, and its unit is that of W per unit of the gradient
    steering = {} if step_size is None else {"boundary_step_size": step_size}
    return {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "skipped_tokens": state.skipped_tokens,
        "loss": result.summary.loss,
        **concept_entries(result.summary, config),
        "grad_norm": result.grad_norm,
        "grad_norm_by_group": result.group_grad_norms,
        "learning_rate": learning_rates,
        **steering,
        # below here two equal runs may differ
        **timing,
        "batch_digest": digest,
        "world_size": world_size,
        "restart_count": state.restart_count,
    }


class MetricsWriter:
    """Writes rows to metrics.jsonl and to TensorBoard.

    Args:
        folder: the run folder.
        first_step: first step that this start will do.
        tensorboard: whether to write events.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self._rows = RowFile(folder, first_step)
        self.events = TensorBoard(folder / files.TENSORBOARD, first_step) if tensorboard else None

    def write(self, row: Row) -> None:
        """Writes a row unless an earlier start has written it; events are written either way."""
        self._rows.append(row)
        if self.events is not None:
            self.events.write(row)

    def flush(self) -> None:
        """Forces everything to the disk; done before a checkpoint claims these steps."""
        self._rows.flush()
        if self.events is not None:
            self.events.flush()

    def close(self) -> None:
        try:
            self._rows.close()
        finally:
            if self.events is not None:
                self.events.close()
