"""The rows of metrics.jsonl: written once each across restarts, read by everybody in one way.

The file is append-only. A start that replays steps after a checkpoint does not write their rows
again, and a last line that a kill left torn is cut off first.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)

Row = dict[str, Any]


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
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(_whole_lines(path.read_bytes()).splitlines(), start=1):
        try:
            row = json.loads(line)
            _key(row)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is no row of metrics ({type(error).__name__}); "
                "remove the line, or move the file away"
            ) from error
        rows.append(row)
    return rows


def training_rows(rows: list[Row]) -> list[Row]:
    """The rows of training steps."""
    return [row for row in rows if "eval_loss" not in row]


def evaluation_rows(rows: list[Row]) -> list[Row]:
    """The rows of evaluations."""
    return [row for row in rows if "eval_loss" in row]


class RowFile:
    """Appends rows to the metrics file of a run, each step and kind once.

    Args:
        folder: the run folder.

    Raises:
        InputError: a line of the file is no row.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / files.METRICS
        _cut_torn_line(path)
        self._written = {_key(row) for row in read_rows(path)}
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, row: Row) -> None:
        """Writes a row unless an earlier start has written it."""
        key = _key(row)
        # a replayed step has the same numbers; TensorBoard gets them, its later events were purged
        if key in self._written:
            return
        self._written.add(key)
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        # one call: a line is there or torn, never mixed with another process's
        if os.write(self._descriptor, line) < len(line):
            raise OSError(f"{files.METRICS}: the disk took only a part of a row")

    def flush(self) -> None:
        """Forces everything to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        os.close(self._descriptor)


def _key(row: Row) -> tuple[str, int]:
    """What makes a row the same as one that was written before: its kind and its step."""
    return ("eval" if "eval_loss" in row else "train", int(row["step"]))


def _whole_lines(contents: bytes) -> bytes:
    return contents[: contents.rfind(b"\n") + 1]


def _cut_torn_line(path: Path) -> None:
    # else the next row would be appended to half a line, and both be lost
    if not path.exists():
        return
    contents = path.read_bytes()
    whole = len(_whole_lines(contents))
    if whole < len(contents):
        logger.warning("cut off a torn last line of %d bytes in %s", len(contents) - whole, path)
        os.truncate(path, whole)
