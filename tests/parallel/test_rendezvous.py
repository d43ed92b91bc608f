"""Processes that come to the rendezvous of a run, those that do not, and those of another run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megadlcm.config import ParallelConfig
from megadlcm.parallel import rendezvous
from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.process_group import join_process_group
from megadlcm.parallel.rendezvous import RendezvousError, find_launcher, meet
from tests.support.distributed import become_own_process, fork, free_port, rank_environment
from tests.support.rendezvous_calls import (
    ANSWERED,
    LATE,
    SOON,
    hear,
    hear_together,
    in_time,
    kept,
    launched,
)

__all__ = ["in_time"]


def test_all_who_come_go_on() -> None:
    port = free_port()
    heard = hear_together([launched(rank, port, 3) for rank in range(3)], LATE)
    assert heard == {0: None, 1: None, 2: None}


def test_those_who_do_not_come_are_named_to_all() -> None:
    port = free_port()
    heard = hear_together([launched(rank, port, 4) for rank in (0, 2)], 2.0)
    assert sorted(heard) == [0, 2]
    for text in heard.values():
        assert text is not None and text.startswith(
            f"rank 1, rank 3 did not join the rendezvous at 127.0.0.1:{port} within 2 s"
        )


def test_a_run_without_rank_0_says_so() -> None:
    port = free_port()
    text = hear(launched(1, port), SOON)
    assert text is not None
    assert text.startswith(f"rank 0 did not open the rendezvous at 127.0.0.1:{port} within 0.3 s")


@pytest.mark.parametrize(
    ("rank", "named"), [(0, "rank 0 does not reach itself"), (1, "rank 0 did")]
)
def test_an_address_that_nobody_knows_is_named_by_all(rank: int, named: str) -> None:
    port = free_port()
    launch = replace(launched(rank, port), master_address="no-such-host.invalid")
    text = hear(launch, SOON)
    assert text is not None and text.startswith(named)
    assert f"no-such-host.invalid:{port} within 0.3 s" in text and "MASTER_ADDR must be" in text


def test_a_launcher_that_is_gone_is_not_waited_for() -> None:
    """Its store was open before it started a process; rank 0 may open one yet."""
    port = free_port()
    launch = launched(1, port, is_store_of_launcher=True)
    text = hear(launch, LATE)
    assert text is not None and text.startswith("rank 1: the launcher is gone: nobody listens")
    assert f"127.0.0.1:{port}" in text
    with pytest.raises(RendezvousError, match=r"^rank 0: the launcher is gone.*"):
        find_launcher(replace(launch, rank=0, world_size=1), "small", LATE)
    with listening(None) as alive:
        find_launcher(replace(launch, rank=0, world_size=1, master_port=alive), "small", LATE)
    text = hear(launched(1, port), SOON)
    assert text is not None and text.startswith("rank 0 did not open the rendezvous")


# -- a port on which something else listens -----------------------------------------------------


@contextlib.contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """The port of a program that knows nothing of runs; None: it never says a word.

    So does a stopped process: the system accepts connections for it.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                stack.enter_context(connection)
                if answer is not None:
                    with contextlib.suppress(OSError):
                        connection.sendall(answer)

        server = threading.Thread(target=serve)
        server.start()
        stack.callback(server.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    "answer",
    [None, b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.0 400 Bad Request\r\n\r\n"],
    ids=["silence", "ssh", "http"],
)
@pytest.mark.parametrize("is_store_of_launcher", [False, True])
def test_a_foreign_program_under_the_address_is_told_in_time(
    answer: bytes | None, is_store_of_launcher: bool
) -> None:
    with listening(answer) as port:
        launch = launched(1, port, is_store_of_launcher=is_store_of_launcher)
        text = hear(launch, SOON)
    host = "the launcher" if is_store_of_launcher else "rank 0"
    assert text is not None and text.startswith(f"rank 1: {host} at 127.0.0.1:{port} ")
    assert "another program listens there" in text and "MASTER_PORT" in text


def test_a_store_of_another_program_is_told_in_time() -> None:
    """It answers, but nobody has said there whose it is."""
    port = free_port()
    kept.append(dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))  # type: ignore[attr-defined]
    text = hear(launched(1, port), SOON)
    assert text is not None and f"rank 0 at 127.0.0.1:{port} " in text and "MASTER_PORT" in text


def test_a_port_that_is_taken_is_named_at_once() -> None:
    with listening(None) as port:
        text = hear(launched(0, port), LATE)
    assert text is not None and f"cannot open the rendezvous at 127.0.0.1:{port}" in text
    assert "the port is taken" in text and "MASTER_PORT" in text


def host_and_stop(port: int) -> None:
    """Rank 0, which stops when the other one has come."""
    rank_0 = rendezvous._Rendezvous(launched(0, port, 3), "small", LATE)
    store = rank_0._connect(is_host=True)
    store.set("rendezvous/start", json.dumps(["first", rank_0.me]))
    store.get("first/rendezvous/1")
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + LATE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody listens on port {port}")


def test_a_rank_0_that_stops_while_ranks_meet_is_told_in_time() -> None:
    """The connection is there: what hangs is a question that nobody answers."""
    port = free_port()
    rank_0 = fork(host_and_stop, port)
    try:
        wait_for_listener(port)
        text = hear(launched(1, port, 3), 2.0)
    finally:
        rank_0.kill()
        rank_0.join()
    assert text is not None
    assert text.startswith(f"rank 1: rank 0 at 127.0.0.1:{port} did not answer within 2 s")


# -- two runs under one address -----------------------------------------------------------------


def test_a_second_run_neither_joins_the_first_nor_holds_it_up() -> None:
    """Its rank 1 comes first, when the first run would have taken it for its own."""
    port = free_port()
    first = [launched(rank, port, start="Slurm job 7, step 0") for rank in range(2)]
    second = [replace(launch, start="Slurm job 7, step 1") for launch in first]
    heard: list[str | None] = []
    waiting = threading.Thread(target=lambda: heard.append(hear(first[0], LATE)))
    waiting.start()
    foreign = hear(second[1], LATE)
    assert foreign is not None and f"finds another run at 127.0.0.1:{port}" in foreign
    assert "small of 2 processes (Slurm job 7, step 1)" in foreign
    assert "small of 2 processes (Slurm job 7, step 0)" in foreign and "MASTER_PORT" in foreign
    refused = hear(second[0], LATE)
    assert refused is not None and "the port is taken" in refused
    assert hear(first[1], LATE) is None
    waiting.join()
    assert heard == [None]


@pytest.mark.parametrize(
    "change",
    [lambda launch: replace(launch, world_size=3), lambda launch: launch],
    ids=["another size", "another name"],
)
def test_a_run_is_known_by_its_name_and_size(
    change: Callable[[LaunchEnvironment], LaunchEnvironment],
) -> None:
    """All that two runs have to tell them apart, which were started without a launcher."""
    port = free_port()
    waiting = threading.Thread(target=hear, args=(launched(0, port), LATE))
    waiting.start()
    other = change(launched(1, port))
    text = hear(other, LATE, "small" if other.world_size == 3 else "large")
    assert text is not None and "finds another run" in text
    assert hear(launched(1, port), LATE) is None
    waiting.join()


def claim_as(monkeypatch: pytest.MonkeyPatch, host: str, pid: int) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(os, "getpid", lambda: pid)


def test_a_rank_is_claimed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    port, own, parent = free_port(), os.getpid(), os.getppid()
    assert hear_together([launched(rank, port) for rank in range(2)], LATE) == {0: None, 1: None}
    claim_as(monkeypatch, socket.gethostname(), parent)
    text = hear(launched(1, port), LATE)
    assert (
        text is not None and f"rank 1 of small of 2 processes is taken at 127.0.0.1:{port}" in text
    )
    assert f"pid {own}; two processes have the same RANK" in text and "MASTER_PORT" in text


def test_a_rank_of_a_process_that_is_no_more_is_taken_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who starts a process again by hand while the others wait for it is no second one."""
    ended = fork(os.getpid)
    ended.join()
    assert ended.pid is not None
    port, own, host = free_port(), os.getpid(), socket.gethostname()
    rank_0 = rendezvous._Rendezvous(launched(0, port), "small", LATE)
    store = rank_0._connect(is_host=True)
    kept.append(store)
    store.set("rendezvous/start", json.dumps(["first", rank_0.me]))
    store.set("first/rendezvous/1", f"elsewhere, pid {ended.pid}\nits")
    text = hear(launched(1, port), LATE)
    assert text is not None and f"is taken at 127.0.0.1:{port} by the process on elsewhere" in text
    store.set("first/rendezvous/1", f"{host}, pid {ended.pid}\nits")
    coming = threading.Thread(target=hear, args=(launched(1, port), LATE))
    coming.start()
    while not (claim := store.get("first/rendezvous/1").decode()).startswith(f"{host}, pid {own}"):
        time.sleep(0.01)
    assert coming.is_alive()  # until rank 0 has seen it
    store.set("first/rendezvous/1/seen", claim)
    coming.join(LATE)
    assert not coming.is_alive()


# -- the whole way ------------------------------------------------------------------------------


def start(function: Callable[..., None], rank: int, port: int, log: Path) -> BaseProcess:
    """A process of a run of two, whose standard error goes to a file."""
    return fork(_live, function, rank_environment(rank, 2, port), str(log))


def _live(function: Callable[[], None], environment: dict[str, str], log: str) -> None:
    with open(log, "wb") as file:
        become_own_process(environment, file.fileno(), file.fileno())
    function()


def join() -> None:
    join_process_group(ParallelConfig(collective_timeout_seconds=ANSWERED))


def meet_all_and_stop() -> None:
    def stop(*_: Any, **words: Any) -> None:
        words["store"].get("heartbeat/1")  # it is past the rendezvous
        os.kill(os.getpid(), signal.SIGSTOP)

    dist.init_process_group = stop
    join()


def test_a_rank_0_that_stops_after_the_rendezvous_is_told_too(tmp_path: Path) -> None:
    """The process group is not there yet, and torch asks its store again to make it."""
    port = free_port()
    ranks = [
        start(function, rank, port, tmp_path / f"{rank}.log")
        for rank, function in enumerate((meet_all_and_stop, join))
    ]
    ranks[1].join(timeout=LATE)
    ranks[0].kill()
    ranks[0].join()
    line = (tmp_path / "1.log").read_text()
    assert (ranks[1].exitcode, line.count("\n")) == (1, 1), line
    assert line.startswith("error: start: rank 1 (") and "in start of the process group" in line
    assert re.search(r"; rank 0 .*does not answer \(stopped\)", line), line


def meet_a_stranger() -> None:
    launch = launched(1, int(os.environ["MASTER_PORT"]))
    for guard in (rendezvous.without_stack_traces, contextlib.nullcontext):
        print("--", file=sys.stderr, flush=True)
        with guard(), contextlib.suppress(RendezvousError):
            meet(launch, "small", SOON)


def test_what_torch_writes_about_a_stranger_is_kept_from_standard_error(tmp_path: Path) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        process = start(meet_a_stranger, 1, port, tmp_path / "log")
        process.join(timeout=LATE)
    _, guarded, bare = (tmp_path / "log").read_text().split("--\n")
    assert guarded == ""
    assert "frame #" in bare  # there was something to keep
