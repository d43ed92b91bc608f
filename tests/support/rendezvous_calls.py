"""Processes of a run in threads of this one: what each hears at the rendezvous."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from megadlcm.parallel import rendezvous
from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.rendezvous import RendezvousError, meet

SOON, LATE = 0.3, 60.0
ANSWERED = 4.0
"""Enough for a store on a busy machine to answer; who does not come is waited for that long."""
kept: list[Any] = []
"""What lives as long as a test: stores, of which that of rank 0 serves the others."""


@pytest.fixture(autouse=True)
def in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits no longer than a test needs, and closes the stores of the test after it."""
    monkeypatch.setattr(rendezvous, "_SECONDS_OF_HOSTING", 2.0)
    monkeypatch.setattr(rendezvous, "_SECONDS_OF_GRACE", 1.0)
    yield
    kept.clear()


def launched(rank: int, port: int, world_size: int = 2, **others: Any) -> LaunchEnvironment:
    return LaunchEnvironment(rank, world_size, rank, "127.0.0.1", port, **others)


def hear(launch: LaunchEnvironment, timeout_seconds: float, name: str = "small") -> str | None:
    """What a process of a run hears at the start; None if all came."""
    try:
        kept.append(meet(launch, name, timeout_seconds))
    except RendezvousError as error:
        assert "\n" not in str(error) and "frame #" not in str(error)
        return str(error)
    return None


def hear_together(
    launches: list[LaunchEnvironment], timeout_seconds: float
) -> dict[int, str | None]:
    """What each of these ranks hears, in threads of this process."""
    heard: dict[int, str | None] = {}

    def run(launch: LaunchEnvironment) -> None:
        heard[launch.rank] = hear(launch, timeout_seconds)

    threads = [threading.Thread(target=run, args=(launch,)) for launch in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard
