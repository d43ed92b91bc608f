"""What two looks at the heartbeats of a run say about the other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megadlcm.parallel.watch.activity import Phase
from megadlcm.parallel.watch.heartbeat import Heartbeat


@dataclass(frozen=True)
class Findings:
    """What the board says about the other processes."""

    text: str
    """One line; empty where all of them wait in the same place."""
    is_certain: bool
    """Whether one of them failed or sends no heartbeat."""
    silent: tuple[int, ...] = ()
    """Ranks that send none."""
    terminated: tuple[int, ...] = ()
    """Ranks that were told to end, where nobody failed and nobody is silent."""


def find_missing(
    before: Mapping[int, Heartbeat],
    after: Mapping[int, Heartbeat],
    others: list[int],
    phase: Phase,
    seconds: float,
) -> Findings:
    """Finds who failed, else who is silent, else who was told to end, else who is elsewhere.

    Args:
        before: heartbeats by rank at the first look.
        after: the same at the second.
        others: the ranks to look for.
        phase: what this process does.
        seconds: between the looks, several heartbeats long.

    Returns:
        What the first of these questions that has an answer found.
    """
    # a failure first: who waits for a process that failed may be silent because of it
    failed = [after[rank] for rank in others if rank in after and after[rank].failure]
    if failed:
        text = "; ".join(f"{one.who} failed: {one.failure}" for one in failed)
        return Findings(text, True)
    silent = [rank for rank in others if _is_silent(before.get(rank), after.get(rank))]
    if silent:
        text = "; ".join(_say_silent(after.get(rank), rank, seconds) for rank in silent)
        return Findings(text, True, tuple(silent))
    # a launcher tells those to end that it still has: after the one that it lost, not before
    told = [after[rank] for rank in others if after[rank].terminated]
    if told:
        text = "; ".join(f"{one.who} was told to end (SIGTERM) in {one.doing}" for one in told)
        return Findings(text, True, terminated=tuple(one.rank for one in told))
    # all are alive: then the ones that matter are those that wait for something else
    here = (phase.place, phase.waits_for)
    elsewhere = [
        after[rank]
        for rank in others
        if not after[rank].left and (after[rank].place, after[rank].waits_for) != here
    ]
    return Findings("; ".join(f"{one.who} is alive in {one.doing}" for one in elsewhere), False)


def _is_silent(before: Heartbeat | None, after: Heartbeat | None) -> bool:
    if after is None:
        return True
    # one that was not there at the first look has just come; one that left is not missed
    return before is not None and after.count == before.count and not after.left


def _say_silent(last: Heartbeat | None, rank: int, seconds: float) -> str:
    if last is None:
        return f"rank {rank} never sent a heartbeat"
    return (
        f"{last.who} sends no heartbeat (dead, or stopped for more than {seconds:.0f} s); "
        f"last seen in {last.doing}"
    )
