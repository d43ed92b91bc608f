"""Processes that come to the store of the run, and those that do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megadlcm.parallel import rendezvous
from megadlcm.parallel.rendezvous import MissingRanksError, open_store, wait_for_all
from tests.support.distributed import free_port

SOON, LATE = 0.3, 60.0
opened: list[Any] = []
"""Stores that live on: that of rank 0 serves the others."""


def join(rank: int, port: int, world_size: int, timeout_seconds: float) -> str | None:
    """What a process of a run hears at the start; None if all came."""
    try:
        store = open_store(rank, "127.0.0.1", port, "0", True, timeout_seconds)
        opened.append(store)
        wait_for_all(store, rank, world_size, timeout_seconds)
    except MissingRanksError as error:
        return str(error)
    return None


def join_together(
    ranks: list[int], world_size: int, timeout_seconds: float
) -> dict[int, str | None]:
    """What each of these ranks hears, in threads of this process."""
    port, heard = free_port(), {}

    def run(rank: int) -> None:
        heard[rank] = join(rank, port, world_size, timeout_seconds)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.fixture(autouse=True)
def close_stores() -> Iterator[None]:
    """Closes the stores of a test after it."""
    yield
    opened.clear()


def test_all_who_come_go_on() -> None:
    assert join_together([0, 1, 2], 3, LATE) == {0: None, 1: None, 2: None}


def test_those_who_do_not_come_are_named_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_OF_HOSTING", 2.0)
    heard = join_together([0, 2], 4, 2.0)
    assert sorted(heard) == [0, 2]
    for text in heard.values():
        assert text is not None and text.startswith(
            "rank 1, rank 3 did not join the rendezvous within 2 s"
        )


def test_a_run_without_rank_0_says_so() -> None:
    text = join(1, free_port(), 2, SOON)
    assert text is not None and text.startswith("rank 0 did not open the rendezvous at 127.0.0.1:")


def test_an_earlier_start_of_the_run_is_not_taken_for_this_one() -> None:
    """A launcher that starts a run again keeps its store."""
    port = free_port()
    store = open_store(0, "127.0.0.1", port, "0", True, LATE)
    for rank in range(2):
        store.set(f"rendezvous/{rank}", "")
    wait_for_all(store, 0, 2, SOON)
    # rank 1 of the next start is a client of the store that is there
    again = open_store(1, "127.0.0.1", port, "1", True, LATE)
    started = time.monotonic()
    with pytest.raises(MissingRanksError, match="rank 0 did not join"):
        wait_for_all(again, 1, 2, SOON)
    assert time.monotonic() - started >= SOON
