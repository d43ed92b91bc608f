"""Rows and texts as TensorBoard events; the one door to it."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.output_folder import writing
from megadlcm.run_folder.rows import Row

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
    "boundary_step_size": "detector/step_size",
    "tokens_per_second": "throughput/tokens_per_second",
    "model_flops_utilization": "throughput/model_flops_utilization",
    "step_seconds": "time/step_seconds",
    "data_seconds": "time/data_seconds",
    "checkpoint_wait_seconds": "time/checkpoint_wait_seconds",
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


class TensorBoard:
    """Writes the events of a run.

    Args:
        folder: the folder of events.
        first_step: first step that this start will do; TensorBoard forgets what an earlier start
            wrote from there on, so that the curve has no double points.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        _say_once()
        with writing(folder):
            self._events = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Writes the numbers of a row under their tags."""
        with writing(self._folder):
            self._write(row)

    def _write(self, row: Row) -> None:
        step = row["step"]
        for key, tag in _SCALARS.items():
            # a number in training rows, one for each domain in evaluation rows: `_GROUPS`
            # `tokens_per_concept` is a number in training rows and by domain in evaluation rows
            if isinstance(row.get(key), int | float):
                self._events.add_scalar(tag, row[key], step)
        for key, tag in _GROUPS.items():
            if isinstance(row.get(key), dict):
                for name, value in row[key].items():
                    self._events.add_scalar(f"{tag}/{name}", value, step)
        # a section of its own: beside a dozen others its lines would bury eval/loss
        for position, value in enumerate(row.get("loss_by_position", [])):
            if value is not None:
                self._events.add_scalar(f"eval_loss_by_position/{position:02d}", value, step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text as a code block."""
        with writing(self._folder):
            self._events.add_text(tag, "    " + text.replace("\n", "\n    "), step)

    def write_lengths(self, concept_lengths: list[int], step: int) -> None:
        """Writes the histogram of concept lengths; entry n counts concepts of n tokens."""
        if not sum(concept_lengths):
            return
        # from counts: TensorBoard's own binning would ask for every length, millions of them
        counts, lengths = np.array(concept_lengths, dtype=float), np.arange(len(concept_lengths))
        used = counts > 0
        with writing(self._folder):
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
        with writing(self._folder):
            self._events.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._events.close()


@functools.cache
def _say_once() -> None:
    """Keeps the thread that writes events from printing what the next call raises anyway."""
    earlier = threading.excepthook

    def say(ended: threading.ExceptHookArgs) -> None:
        # its class is private, so its name is no promise: without it the error is said twice
        is_writer = type(ended.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(ended.exc_value, OSError)):
            earlier(ended)

    threading.excepthook = say
