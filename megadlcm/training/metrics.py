"""One row of metrics.jsonl for each logged step, and the same numbers for TensorBoard.

The file is append-only across restarts. A start that replays steps after a checkpoint does not
write their rows again, and a last line that a kill left torn is cut off first.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig
from megadlcm.ops.compression import ratio_loss
from megadlcm.training.objective import StepSummary
from megadlcm.training.state import TrainState
from megadlcm.training.step import StepResult

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# TensorBoard tag of a row's key; other keys stay in the file
_SCALARS = {
    "loss": "train/loss",
    "ratio_loss": "train/ratio_loss",
    "boundary_fraction": "concepts/boundary_fraction",
    "mean_boundary_prob": "concepts/mean_boundary_prob",
    "tokens_per_concept": "concepts/tokens_per_concept",
    "tokens_per_concept_threshold": "concepts/tokens_per_concept_threshold",
    "near_half_fraction": "concepts/near_half_fraction",
    "grad_norm": "grad_norm/total",
    "tokens_per_second": "throughput/tokens_per_second",
    "model_flops_utilization": "throughput/model_flops_utilization",
    "step_seconds": "time/step_seconds",
    "data_seconds": "time/data_seconds",
    "memory_bytes": "memory/peak_bytes",
    "eval_loss": "eval/loss",
    "bits_per_byte": "eval/bits_per_byte",
    "tokens_per_concept_overall": "eval/tokens_per_concept",
}
_GROUPS = {
    "learning_rate": "learning_rate",
    "grad_norm_by_group": "grad_norm",
    "tokens_per_concept": "eval/tokens_per_concept",
    "bits_per_byte_by_domain": "eval/bits_per_byte",
    "loss_by_domain": "eval/loss",
}


def concept_entries(summary: StepSummary, config: RunConfig) -> dict[str, float]:
    """Entries of a row that describe the concepts of a step; empty for the dense control."""
    if config.model.architecture != "dlcm":
        return {}
    fraction, prob = summary.boundary_fraction, summary.mean_boundary_prob
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
        learning_rates: rate of each muP group in this step.
        timing: throughput, seconds and memory.
        digest: digest of the global batch.
        world_size: processes of the run.

    Returns:
        The row, JSON-able.
    """
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
        **timing,
        "batch_digest": digest,
        "world_size": world_size,
        "restart_count": state.restart_count,
    }


class MetricsWriter:
    """Appends rows to metrics.jsonl and to TensorBoard.

    Args:
        output_dir: the run folder.
        first_step: first step that this start will do; TensorBoard forgets what an earlier start
            wrote from there on, so that the curve has no double points.
        tensorboard: whether to write events.
    """

    def __init__(self, output_dir: Path, first_step: int, tensorboard: bool) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / METRICS_FILE
        self._written = read_written_rows(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._events: SummaryWriter | None = None
        if tensorboard:
            self._events = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> MetricsWriter:
        """Returns the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flushes and closes."""
        self.close()

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row unless an earlier start has written it; events are written either way."""
        key = row_key(row)
        if key not in self._written:
            self._written.add(key)
            line = (json.dumps(row, allow_nan=False) + "\n").encode()
            # one call: a line is there or torn, not mixed
            if os.write(self._descriptor, line) < len(line):
                raise OSError(f"{METRICS_FILE}: the disk took only a part of a row")
        self._write_events(row)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text to TensorBoard, as a code block."""
        if self._events is not None:
            self._events.add_text(tag, "    " + text.replace("\n", "\n    "), step)

    def write_lengths(self, concept_lengths: list[int], step: int) -> None:
        """Writes the histogram of concept lengths to TensorBoard."""
        if self._events is None or not sum(concept_lengths):
            return
        counts, lengths = np.array(concept_lengths, dtype=float), np.arange(len(concept_lengths))
        used = counts > 0
        self._events.add_histogram_raw(
            "concepts/length",
            min=float(lengths[used].min()),
            max=float(lengths[used].max()),
            num=int(counts.sum()),
            sum=float((counts * lengths).sum()),
            sum_squares=float((counts * lengths**2).sum()),
            bucket_limits=(lengths + 0.5).tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def flush(self) -> None:
        """Forces everything to the disk; done before a checkpoint claims these steps."""
        os.fsync(self._descriptor)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        os.close(self._descriptor)
        if self._events is not None:
            self._events.close()

    def _write_events(self, row: dict[str, Any]) -> None:
        if self._events is None:
            return
        for key, tag in _SCALARS.items():
            if isinstance(row.get(key), int | float):
                self._events.add_scalar(tag, row[key], row["step"])
        for key, tag in _GROUPS.items():
            if isinstance(row.get(key), dict):
                for name, value in row[key].items():
                    self._events.add_scalar(f"{tag}/{name}", value, row["step"])
        for position, value in enumerate(row.get("loss_by_position", [])):
            if value is not None:
                self._events.add_scalar(f"eval_loss_by_position/{position:02d}", value, row["step"])


def row_key(row: dict[str, Any]) -> tuple[str, int]:
    """What makes a row the same as one that was written before: its kind and its step."""
    return ("eval" if "eval_loss" in row else "train", int(row["step"]))


def read_written_rows(path: Path) -> set[tuple[str, int]]:
    """Reads which rows a metrics file has, after cutting off a torn last line.

    Args:
        path: metrics.jsonl; may be missing.

    Returns:
        Kind and step of each row.

    Raises:
        InputError: a whole line that is not a row.
    """
    if not path.exists():
        return set()
    contents = path.read_bytes()
    whole = contents[: contents.rfind(b"\n") + 1]
    if len(whole) < len(contents):
        torn = len(contents) - len(whole)
        logger.warning("cut off a torn last line of %d bytes in %s", torn, path)
        os.truncate(path, len(whole))
    keys = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            keys.add(row_key(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is no row of metrics ({type(error).__name__}); "
                "remove the line, or move the file away"
            ) from error
    return keys
