"""What happens to a run beside its steps: a line each in events.jsonl."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.output_folder import reading, writing
from megadlcm.run_folder import files


def now() -> str:
    """The time in UTC, as it stands in events and records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append_event(folder: Path, event: str, **facts: Any) -> None:
    """Appends an event to those of a run.

    Args:
        folder: the run folder.
        event: what happened, in a word or two.
        facts: what belongs to it, JSON-able.
    """
    append_lines(folder / files.EVENTS, [{"time": now(), "event": event} | facts])


def append_lines(path: Path, objects: list[dict[str, Any]]) -> None:
    """Appends objects as lines of JSON, durably; a torn last line, which a kill left, is cut."""
    cut_torn_line(path)
    lines = "".join(json.dumps(one, allow_nan=False) + "\n" for one in objects).encode()
    with writing(path, len(lines)), open(path, "ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> int:
    """Cuts off what follows the last whole line of a file; returns how many bytes that were."""
    # else the next line would be appended to half a one, and both be lost
    if not path.exists():
        return 0
    with reading(path):
        contents = path.read_bytes()
    torn = len(contents) - len(whole_lines(contents))
    if torn:
        with writing(path):
            os.truncate(path, len(contents) - torn)
    return torn


def whole_lines(contents: bytes) -> bytes:
    """What of a file's contents are whole lines."""
    return contents[: contents.rfind(b"\n") + 1]
