"""Integer options of commands, checked where the work is: a caller in Python is told the same."""

from __future__ import annotations

from data_pipeline.errors import InputError

SHARD_TOKENS = 10_000_000
"""Most tokens of a shard, where nothing else is asked for."""
PART_BYTES = 256 << 20
"""Bytes of input that a task takes up at once, where nothing else is asked for."""


def check_least(option: str, value: int | None, least: int, way_out: str = "give a count") -> None:
    """Refuses a number that is too small.

    Args:
        option: as it is typed, such as "--workers".
        value: what was given; None where nothing was.
        least: smallest that will do.
        way_out: what to do instead.

    Raises:
        InputError: it is smaller.
    """
    if value is not None and value < least:
        raise InputError(f"{option} {value}: must be >= {least}; {way_out}", key=option)
