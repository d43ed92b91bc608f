"""The rows of metrics.jsonl: those of the steps that the run's checkpoints look back on, each once.

The file is append-only as long as a run repeats itself: a start that replays steps after a
checkpoint finds its rows there. The first that it does not find tells of another branch, with
another learning rate, other data or other code. Then the rest of the earlier branch goes to
metrics.abandoned.jsonl. A last line that a kill left torn is cut off first.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.output_folder import reading, writing
from megadlcm.run_folder import files
from megadlcm.run_folder.events import (
    append_event,
    append_lines,
    cut_torn_line,
    now,
    whole_lines,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]

MEASURED_KEYS = (
    "tokens_per_second",
    "step_seconds",
    "data_seconds",
    "checkpoint_wait_seconds",
    "memory_bytes",
    "model_flops_utilization",
    "restart_count",
)
"""What two equal runs do not share."""
_SET_ASIDE = "set_aside"


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a metrics file; a torn last line, which a kill left, is left out.

    Args:
        path: metrics.jsonl, or the run folder that has one; may be missing.

    Returns:
        The rows in the order in which they were written.

    Raises:
        InputError: a whole line that is not a row.
    """
    # a run that has just begun has no row yet, which is no error to whoever watches it
    if path.is_dir():
        path /= files.METRICS
    return [row for _, row in _placed_rows(path)]


def _placed_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Where each row begins, and the row."""
    if not path.exists():
        return
    place = 0
    with reading(path):
        contents = path.read_bytes()
    for number, line in enumerate(whole_lines(contents).splitlines(True), start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is no row of metrics ({type(error).__name__}); "
                "remove the line, or move the file away"
            ) from error
        yield place, row
        place += len(line)


def training_rows(rows: list[Row]) -> list[Row]:
    """The rows of training steps."""
    return [row for row in rows if "eval_loss" not in row]


def evaluation_rows(rows: list[Row]) -> list[Row]:
    """The rows of evaluations."""
    return [row for row in rows if "eval_loss" in row]


class RowFile:
    """Appends the rows of a start to the metrics file of its run.

    Args:
        folder: the run folder.
        first_step: first step that this start will do.

    Raises:
        InputError: a line of the file is no row.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / files.METRICS
        torn = cut_torn_line(self._path)
        if torn:
            logger.warning("cut off a torn last line of %d bytes in %s", torn, self._path)
        # rows of steps that this start is going to do, in the order in which it will write them
        self._earlier: deque[tuple[int, Row]] = deque()
        for placed in _placed_rows(self._path):
            if self._earlier or placed[1]["step"] >= first_step:
                self._earlier.append(placed)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with writing(self._path):
            self._descriptor = os.open(self._path, flags, 0o666)

    def append(self, row: Row) -> None:
        """Writes a row unless an earlier start has written the same."""
        text = json.dumps(row, allow_nan=False)
        if self._earlier:
            # a replayed step has the same numbers, and keeps the row that was written first
            if _numbers(json.loads(text)) == _numbers(self._earlier[0][1]):
                self._earlier.popleft()
                return
            self._set_aside(row.get("restart_count"))
        line = f"{text}\n".encode()
        with writing(self._path, len(line)):
            # one call: a line is there or torn, never mixed with another process's
            written = os.write(self._descriptor, line)
            # what was left of the disk; the next call says why it took no more
            while written < len(line):
                written += os.write(self._descriptor, line[written:])

    def flush(self) -> None:
        """Forces everything to the disk."""
        with writing(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)

    def _set_aside(self, restart_count: int | None) -> None:
        """Moves the rows that this start has not written again to the file of abandoned ones."""
        aside, place = self._folder / files.ABANDONED, self._earlier[0][0]
        rows = [row for _, row in self._earlier]
        # there before they are cut off here; a start that was killed in between had copied some
        known = {_text(row) for row in read_rows(aside)}
        time = now()
        fresh = [row | {_SET_ASIDE: time} for row in rows if _text(row) not in known]
        append_lines(aside, fresh)
        steps = [row["step"] for row in rows]
        append_event(
            self._folder,
            "rows set aside",
            first_step=min(steps),
            last_step=max(steps),
            rows=len(rows),
            file=files.ABANDONED,
            restart_count=restart_count,
        )
        # the same file, cut: who has it open goes on reading what is appended
        with writing(self._path):
            os.truncate(self._descriptor, place)
            os.fsync(self._descriptor)
        self._earlier.clear()
        logger.warning(
            "step %d is not what an earlier start made of it: moved %d rows to %s",
            min(steps),
            len(rows),
            aside,
        )


def _numbers(row: Row) -> Row:
    """What two equal runs share of a row."""
    return {key: value for key, value in row.items() if key not in MEASURED_KEYS}


def _text(row: Row) -> str:
    return json.dumps({key: value for key, value in row.items() if key != _SET_ASIDE})
