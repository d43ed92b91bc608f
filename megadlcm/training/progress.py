"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

_LINE_SECONDS = 2.0
"""Plain lines are at least this far apart, except for the first and the last step."""


class ProgressReport:
    """Shows step, loss, ratio, speed and remaining time.

    Args:
        first_step: steps completed before this start.
        train_steps: steps of the whole run.
        enabled: False on all ranks but one.
    """

    def __init__(self, first_step: int, train_steps: int, enabled: bool) -> None:
        self.train_steps = train_steps
        self._first_step = first_step
        self._started = time.perf_counter()
        self._last_line = 0.0
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "train", total=train_steps, completed=first_step, numbers=""
            )
            self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        """Shows a training row; the log file gets a line for each."""
        numbers = _numbers(row)
        eta = self._remaining(row["step"])
        line = f"step {row['step']}/{self.train_steps}  {numbers}  ETA {eta}"
        logger.info(line)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], numbers=numbers)
            return
        now = time.perf_counter()
        edge = row["step"] in (self._first_step + 1, self.train_steps)
        if edge or now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Shows one line above the bar, and logs it."""
        logger.info(line)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        seconds = (time.perf_counter() - self._started) / max(done, 1) * (self.train_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"


def _numbers(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    if "tokens_per_concept" in row:
        parts.append(f"ratio {row['tokens_per_concept']:.2f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
