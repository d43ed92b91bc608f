"""Starts of one run in the store of a launcher, which keeps it when it starts a run again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from megadlcm.parallel import rendezvous
from tests.support.distributed import free_port
from tests.support.rendezvous_calls import (
    ANSWERED,
    LATE,
    hear,
    hear_together,
    in_time,
    kept,
    launched,
)

__all__ = ["in_time"]


def test_runs_that_a_launcher_holds_keep_apart_in_its_store() -> None:
    """Nobody owns that store: what keeps them apart is that their keys bear their names."""
    port = free_port()
    kept.append(dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))  # type: ignore[attr-defined]
    first = [launched(rank, port, is_store_of_launcher=True) for rank in range(2)]
    assert hear_together(first, LATE) == {0: None, 1: None}
    text = hear(replace(first[1], start="torchrun other"), ANSWERED)
    assert text is not None and text.startswith("rank 0 did not join the rendezvous")


def open_launcher() -> tuple[int, Any]:
    """Port and connection of the store of a launcher."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    kept.append(store)
    return port, store


@contextlib.contextmanager
def on_another_host(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Processes that nobody here can ask whether they live."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"host{number}")
        yield


@pytest.mark.parametrize("came_first", [0, 1])
def test_an_earlier_start_of_the_run_is_not_taken_for_this_one(
    came_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that starts a run again keeps its store, also where its agents count apart."""
    port, _ = open_launcher()
    launches = [launched(rank, port, is_store_of_launcher=True) for rank in range(2)]
    stores: list[Any] = []
    for number in range(3):
        with on_another_host(monkeypatch, number):
            heard: list[str | None] = []
            first = threading.Thread(
                target=lambda heard=heard: heard.append(hear(launches[came_first], LATE))
            )
            first.start()
            time.sleep(0.3)  # it finds the start before
            assert first.is_alive()
            assert hear(launches[1 - came_first], LATE) is None
            first.join()
        assert heard == [None]
        stores += kept[-2:]
    # what the last ones wrote is not read by these
    for number, (store, _) in enumerate(stores):
        store.add("starts", number // 2 + 1)
    assert [store.add("starts", 0) for store, _ in stores] == [2, 2, 4, 4, 6, 6]


def test_a_start_that_failed_is_not_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which nobody was left to come, or which some gave up."""
    port, _ = open_launcher()
    launches = [launched(rank, port, 3, is_store_of_launcher=True) for rank in range(3)]
    with on_another_host(monkeypatch, 1):
        given_up = hear_together([launches[0], launches[2]], ANSWERED)
    assert all(text and text.startswith("rank 1 did not join") for text in given_up.values())
    with on_another_host(monkeypatch, 2):
        text = hear(launches[1], ANSWERED)
        assert text is not None and text.startswith("rank 0 did not join the rendezvous")
        assert hear_together(launches, LATE) == dict.fromkeys(range(3))


def test_a_claim_of_an_earlier_start_is_no_second_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rank 0 was killed before all had come; one rank of it stands there still."""
    port, store = open_launcher()
    launches = [launched(rank, port, is_store_of_launcher=True) for rank in range(2)]
    earlier = rendezvous._Rendezvous(launches[0], "small", LATE)
    within = dist.PrefixStore(earlier.run, store)  # type: ignore[attr-defined]
    within.set("rendezvous/start", json.dumps(["first", "elsewhere, pid 7"]))
    within.set("first/rendezvous/1", "elsewhere, pid 8\nits")
    text = hear(launches[1], ANSWERED)
    assert text is not None and text.startswith("rank 0 did not join the rendezvous")
    assert text.endswith("in the start before it, rank 1 was on elsewhere, pid 8")
    assert hear_together(launches, LATE) == {0: None, 1: None}


def test_a_second_rank_0_beside_one_that_lives_is_refused() -> None:
    port, _ = open_launcher()
    launches = [launched(rank, port, is_store_of_launcher=True) for rank in range(2)]
    assert hear_together(launches, LATE) == {0: None, 1: None}
    text = hear(launches[0], LATE)
    assert text is not None and f"is taken at 127.0.0.1:{port} by the process on" in text
    assert f"pid {os.getpid()}; two processes" in text
