"""The rendezvous in the store of the run, and who does not join it: nobody could be asked later."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megadlcm.parallel.watch.heartbeat import Store

_LONGEST_PAUSE = 1.0
_SECONDS_OF_HOSTING = 5.0
"""How long the process that holds the store stays, for others to read what it found."""
_VERDICT = "rendezvous/verdict"


class MissingRanksError(RuntimeError):
    """Not all processes of the run joined the rendezvous in time."""


def open_store(
    rank: int,
    address: str,
    port: int,
    attempt: str,
    is_hosted_by_rank_0: bool,
    timeout_seconds: float,
) -> Any:
    """Connects to the store of the run; rank 0 opens it, if no launcher did.

    Args:
        rank: index of this process.
        address: host of the store.
        port: its port.
        attempt: name of this start of the run: a launcher that starts it again keeps its store, and
            what the last processes wrote must not be taken for what these say.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
        timeout_seconds: how long to wait for it.

    Returns:
        A connection of its own, one of torch's stores.

    Raises:
        MissingRanksError: nobody listens there.
    """
    is_master = is_hosted_by_rank_0 and rank == 0
    if not is_master:
        # torch's own waiting takes longer than it was told and writes a stack trace
        _wait_for_listener(address, port, is_hosted_by_rank_0, timeout_seconds)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]


def _wait_for_listener(
    address: str, port: int, is_hosted_by_rank_0: bool, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    pause = 0.05
    while True:
        try:
            socket.create_connection((address, port), timeout=timeout_seconds).close()
            return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                host = "rank 0" if is_hosted_by_rank_0 else "the launcher"
                raise MissingRanksError(
                    f"{host} did not open the rendezvous at {address}:{port} within "
                    f"{timeout_seconds:g} s (parallel.collective_timeout_seconds; {error}): "
                    "see what it says itself"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def wait_for_all(store: Store, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Returns when every process of the run has called this.

    Args:
        store: from `open_store`.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: how long to wait.

    Raises:
        MissingRanksError: names those that did not join.
    """
    keys = [f"rendezvous/{other}" for other in range(world_size)]
    deadline = time.monotonic() + timeout_seconds
    pause = 0.01
    try:
        store.set(keys[rank], "")
        # polled, not `store.wait`: what that raises at its end names nobody
        while not store.check(keys):
            if store.check([_VERDICT]):
                raise MissingRanksError(store.get(_VERDICT).decode())
            if time.monotonic() > deadline:
                missing = [other for other in range(world_size) if not store.check([keys[other]])]
                if missing:  # else the last one joined between the two questions
                    _give_up(store, rank, missing, timeout_seconds)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
    except dist.DistError as error:
        raise MissingRanksError(
            f"the store of the run is gone, and rank 0 with it: {error}"
        ) from error


def _give_up(store: Store, rank: int, missing: list[int], timeout_seconds: float) -> None:
    names = ", ".join(f"rank {other}" for other in missing)
    text = (
        f"{names} did not join the rendezvous within {timeout_seconds:g} s "
        "(parallel.collective_timeout_seconds): see what it says itself"
    )
    store.set(_VERDICT, text)  # the others started their clocks later: all are told the same
    if rank == 0:
        time.sleep(_SECONDS_OF_HOSTING)
    raise MissingRanksError(text)
