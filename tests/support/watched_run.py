"""Three processes and their watchdogs on a board in this process, by a clock of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megadlcm.parallel.watch.activity import Activity, doing
from megadlcm.parallel.watch.heartbeat import Heartbeat
from megadlcm.parallel.watch.watchdog import EXIT_CODE, Watchdog
from tests.support.fake_clock import FakeClock

INTERVAL = 1.0
TIMEOUT = 5 * INTERVAL
LONG = 8 * TIMEOUT
WORLD_SIZE = 3


class Ended(Exception):  # noqa: N818
    """A watchdog ended its process, with this code."""


class Run:
    """Three processes on one board, of which those that live send a heartbeat at every tick."""

    def __init__(self) -> None:
        self.clock = FakeClock(INTERVAL)
        self.store: Any = dist.HashStore()  # type: ignore[attr-defined]
        self.activities = [Activity(self.clock) for _ in range(WORLD_SIZE)]
        for activity in self.activities:
            for place in ("step 5", "step 6", "step 7"):
                activity.arrive(place)
        self.watchdogs = [self.watchdog(rank) for rank in range(WORLD_SIZE)]

    def watchdog(self, rank: int, timeout_seconds: float = TIMEOUT) -> Watchdog:
        """The watchdog of a process; ending it raises, where the process would be gone."""

        def end(code: int) -> None:
            raise Ended(code)

        activity = self.activities[rank]
        return Watchdog(self.store, rank, WORLD_SIZE, timeout_seconds, activity=activity, end=end)

    def lives(self, *ranks: int) -> None:
        """These processes, and no others, send heartbeats from now on."""
        self.clock.others = [self.watchdogs[rank].send_heartbeat for rank in ranks]

    def shown(self, rank: int) -> Heartbeat:
        """The last heartbeat of a process."""
        heartbeats = self.watchdogs[rank].board.read()
        assert heartbeats is not None
        return heartbeats[rank]

    def watch(self, watchdog: Watchdog, seconds: float) -> None:
        """Lets time pass for a process that does not move."""
        end = self.clock.now() + seconds
        while self.clock.now() < end:
            self.clock.sleep(INTERVAL)
            watchdog.beat()

    def waits_for_ever(
        self, watchdog: Watchdog, what: str = "data parallel all-reduce", computes: bool = False
    ) -> float:
        """Stays in a phase until the watchdog ends the process; the seconds until then."""
        began = self.clock.now()
        activity = self.activities[watchdog.rank]
        with pytest.raises(Ended, match=f"^{EXIT_CODE}$"), doing(what, computes, activity):
            self.watch(watchdog, 100 * TIMEOUT)
        return self.clock.now() - began

    def breaks_in(self, watchdog: Watchdog, phase: str) -> str:
        """Raises in a phase; the explanation."""
        with (
            pytest.raises(RuntimeError) as caught,
            doing(phase, activity=self.activities[watchdog.rank]),
        ):
            raise RuntimeError("out of memory")
        return watchdog.explain(caught.value)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a process said before it ended."""
    (line,) = capsys.readouterr().err.splitlines()
    return line
