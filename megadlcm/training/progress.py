"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

from data_pipeline.errors import StorageError
from data_pipeline.output_folder import DISK_ERRORS
from data_pipeline.progress import LineLimit, open_bar
from data_pipeline.tables import printable

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
        self._enabled = enabled
        self._lines = LineLimit(_LINE_SECONDS, at_once=True)
        self._bar = None
        if enabled:
            self._bar = open_bar("[bold]train", train_steps, first_step, self._steps(first_step))

    def show(self, row: dict[str, Any]) -> None:
        """Shows a training row; the log file gets a line for each."""
        numbers = _numbers(row)
        # the log has every row, whatever the screen leaves out
        eta = self._remaining(row["step"])
        line = f"step {row['step']}/{self.train_steps}  {numbers}  ETA {eta}"
        logger.info(line)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(row["step"], f"{self._steps(row['step'])} {numbers}")
            return
        edge = row["step"] in (self._first_step + 1, self.train_steps)
        if self._lines.allows(always=edge):
            _print(line)

    def say(self, line: str) -> None:
        """Shows one line above the bar, and logs it."""
        logger.info(line)
        if self._bar is not None:
            self._bar.say(line)
        elif self._enabled:
            _print(line)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.close()

    def _steps(self, step: int) -> str:
        return f"[progress.download]{step:{len(str(self.train_steps))}d}/{self.train_steps}[/]"

    def _remaining(self, step: int) -> str:
        done = step - self._first_step  # of this start: an earlier one may have been faster
        seconds = (time.perf_counter() - self._started) / max(done, 1) * (self.train_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"


def _print(line: str) -> None:
    try:
        print(printable(line), flush=True)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise StorageError(
            f"the output cannot be written ({error.strerror}); send it to another place and start "
            "again"
        ) from error


def _numbers(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    if "tokens_per_concept" in row:
        parts.append(f"ratio {row['tokens_per_concept']:.2f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
