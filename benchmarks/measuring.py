"""Interleaved timings on chosen cores, and what they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


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


def tokens_per_second(timings: Sequence[Timing], by: str = "wall_seconds") -> dict[str, float]:
    """Returns the spread of the speeds of one way, by a clock of Timing."""
    return spread([each.tokens / getattr(each, by) for each in timings])


def speed_ratio(
    above: Sequence[Timing], below: Sequence[Timing], by: str = "wall_seconds"
) -> dict[str, float]:
    """Returns the spread of the round-by-round ratios of speeds, by a clock of Timing."""
    return spread(
        [
            one.tokens / getattr(one, by) / (other.tokens / getattr(other, by))
            for one, other in zip(above, below, strict=True)
        ]
    )


def compared(timings: Sequence[Timing], other: Sequence[Timing], turned: bool) -> dict[str, Any]:
    """Returns speeds by both clocks and their ratio to those of another way.

    Args:
        timings: of the way.
        other: of the other way.
        turned: whether the ratio is the other's speed over this one's.
    """
    above, below = (other, timings) if turned else (timings, other)
    return {
        f"{name}_by_{clock}": found
        for clock in ("wall", "cpu")
        for name, found in (
            ("tokens_per_second", tokens_per_second(timings, f"{clock}_seconds")),
            ("ratio", speed_ratio(above, below, f"{clock}_seconds")),
        )
    }


def table(ways: Mapping[str, Any], ratio: str) -> list[str]:
    """Returns a markdown table of what `compared` gives for each way, or of a text in its place."""
    lines = [f"| way | M tokens/s | by processor time | {ratio} | by processor time |"]
    lines.append("|---|---|---|---|---|")
    for name, row in ways.items():
        if isinstance(row, str):
            lines.append(f"| {name} | {row} | | | |")
            continue
        wall, cpu = (row[f"tokens_per_second_by_{clock}"]["median"] for clock in ("wall", "cpu"))
        ratios = [_with_range(row[f"ratio_by_{clock}"]) for clock in ("wall", "cpu")]
        lines.append(f"| {name} | {wall / 1e6:.2f} | {cpu / 1e6:.2f} | {' | '.join(ratios)} |")
    return lines


def _with_range(found: Mapping[str, float]) -> str:
    return "{median:.2g} ({min:.2g} - {max:.2g})".format(**found)


def described(facts: Mapping[str, Any]) -> str:
    """Returns a sentence on what `machine` says."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    cores = f"{facts['cores']} core" + "s" * (facts["cores"] > 1)
    return f"{cores} of {facts['processor']}; {versions}."


def machine(*packages: str) -> dict[str, Any]:
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
