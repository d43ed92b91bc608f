"""Interleaved timings on chosen cores, and what they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """One repetition of one way."""

    tokens: int
    wall_seconds: float
    cpu_seconds: float
    """Of this process; differs from the wall where others use the core."""


Work = Callable[[], int]
"""Does a piece of work and returns its tokens."""


def use_cores(num_cores: int) -> None:
    """Keeps this process and its children to the first `num_cores` cores that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])


def interleaved(ways: Mapping[str, Work], rounds: int) -> dict[str, list[Timing]]:
    """Runs every way once per round, so that a machine that slows down slows down all.

    Args:
        ways: by name; each goes on where its last repetition ended.
        rounds: repetitions of each that count; one before them does not.

    Returns:
        Per way its timings in the order of the rounds.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name, work in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = work()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                timings[name].append(Timing(tokens, *spent))
    return timings


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def tokens_per_second(timings: Sequence[Timing]) -> dict[str, float]:
    """Returns the spread of the speeds of one way, by the wall."""
    return spread([each.tokens / each.wall_seconds for each in timings])


def speed_ratio(above: Sequence[Timing], below: Sequence[Timing]) -> dict[str, float]:
    """Returns the spread of the round-by-round ratios of speeds, by the wall."""
    return spread([_speed(one) / _speed(other) for one, other in zip(above, below, strict=True)])


def cpu_ratio(above: Sequence[Timing], below: Sequence[Timing]) -> dict[str, float]:
    """Returns the spread of the round-by-round ratios of tokens per second of processor time."""
    return spread(
        [
            one.tokens / one.cpu_seconds / (other.tokens / other.cpu_seconds)
            for one, other in zip(above, below, strict=True)
        ]
    )


def _speed(timing: Timing) -> float:
    return timing.tokens / timing.wall_seconds


def machine(*packages: str) -> dict[str, object]:
    """Returns the cores in use and the versions of Python, numpy and the packages that are here."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "versions": versions}


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
