"""The rendezvous in the store of the run, and who does not join it: nobody could be asked later.

Under one address another run may meet, or a program that knows nothing of runs may listen. So the
host of a store says whose it is, the keys of a run bear its name, and each rank is claimed by one
process. A launcher keeps its store when it starts a run again, and counts its starts on each node
for itself: so rank 0 names every start anew, the others come to the newest one, and go on once
rank 0 says that it saw all of them. What hangs in there hangs in torch, whose store waits without
limit for a host that is stopped or never answers: all of it is done by a thread that nobody waits
for longer than allowed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megadlcm.parallel.environment import LaunchEnvironment
from megadlcm.parallel.watch.watchdog import first_line

_LONGEST_PAUSE = 1.0
_LONGEST_PAUSE_OF_STORE = 0.25
_SECONDS_OF_HOSTING = 5.0
"""How long the process that holds the store stays, for others to read what it found."""
_SECONDS_OF_GRACE = 5.0
"""How much longer than allowed the thread may take: what it finds says more than that it hangs."""
_BACKLOG = 2048
"""Connections that wait to be accepted, as many as torch allows."""
_KEY = "parallel.collective_timeout_seconds"
_OWN_PORT = "give this run a port of its own (MASTER_PORT)"
_OWNER = "rendezvous/owner"
_START = "rendezvous/start"
"""Name of the newest start, by rank 0."""
_VERDICT = "rendezvous/verdict"


class RendezvousError(RuntimeError):
    """The processes of the run did not find each other."""


def meet(launch: LaunchEnvironment, name: str, timeout_seconds: float) -> tuple[Any, Any]:
    """Returns when every process of the run has called this.

    Args:
        launch: what the launcher says about this process.
        name: of the run, the same for all its processes.
        timeout_seconds: how long to wait for the others.

    Returns:
        Two connections to the store of the run, which are stores of torch: one that waits for an
        answer holds up whoever else uses it.

    Raises:
        RendezvousError: one line that names the address, and who does not come or is not wanted.
    """
    rendezvous = _Rendezvous(launch, name, timeout_seconds)
    outcome: Future[tuple[Any, Any]] = Future()

    def run() -> None:
        try:
            outcome.set_result(rendezvous.join())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return outcome.result(timeout_seconds + _SECONDS_OF_GRACE)
    except TimeoutError:
        raise RendezvousError(
            f"{rendezvous.silence} within {timeout_seconds:g} s ({_KEY}): it is stopped, or "
            f"another program listens there: then {_OWN_PORT}"
        ) from None
    except RendezvousError:
        if launch.rank == 0 and rendezvous.has_guests:
            time.sleep(_SECONDS_OF_HOSTING)
        raise


def find_launcher(launch: LaunchEnvironment, name: str, timeout_seconds: float) -> None:
    """Looks whether the launcher that keeps the store of the run is still there.

    Raises:
        RendezvousError: it is not.
    """
    _Rendezvous(launch, name, timeout_seconds).reach()


class _Rendezvous:
    """One process that looks for the others.

    Args:
        launch: what the launcher says about it.
        name: of the run.
        timeout_seconds: how long to wait.
    """

    def __init__(self, launch: LaunchEnvironment, name: str, timeout_seconds: float) -> None:
        self.launch, self.timeout_seconds = launch, timeout_seconds
        self.deadline = time.monotonic() + timeout_seconds
        start = f" ({launch.start})" if launch.start else ""
        self.run = f"{name} of {launch.world_size} processes{start}"
        self.me = f"{socket.gethostname()}, pid {os.getpid()}"
        # hosts and pids may be the same in two containers
        self.claim = f"{self.me}\n{uuid.uuid4().hex}"
        self.place = f"{launch.master_address}:{launch.master_port}"
        self.host = "the launcher" if launch.is_store_of_launcher else "rank 0"
        self.is_host = launch.rank == 0 and not launch.is_store_of_launcher
        self.has_guests = False

    @property
    def silence(self) -> str:
        """Who does not answer this process."""
        return f"rank {self.launch.rank}: {self.host} at {self.place} did not answer"

    def join(self) -> tuple[Any, Any]:
        """Finds the store, claims the rank and waits for the others."""
        try:
            store = self._connect(is_host=self.is_host)
            name = self._lead(store) if self.launch.rank == 0 else self._follow(store)
            return _within(name, store), _within(name, self._connect())
        except dist.DistError as error:
            raise RendezvousError(
                f"rank {self.launch.rank}: {self.host} at {self.place} is gone, or is no store of "
                f"a run ({first_line(error)}): see what it says itself; where another program "
                f"listens there, {_OWN_PORT}"
            ) from error

    def _connect(self, is_host: bool = False) -> Any:
        """A connection of its own to the store, under the name of the run."""
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(self._listen()) if is_host else None
            self.reach()  # torch's own waiting takes longer, and writes a stack trace
            store = dist.TCPStore(  # type: ignore[attr-defined]
                self.launch.master_address,
                self.launch.master_port,
                is_master=is_host,
                timeout=timedelta(seconds=self.timeout_seconds),
                wait_for_workers=False,
                master_listen_fd=None if listener is None else listener.detach(),
            )
        if is_host:
            store.set(_OWNER, json.dumps({"run": self.run, "rank_0": self.me}))
        elif not self.launch.is_store_of_launcher:
            owner = json.loads(store.get(_OWNER))
            if owner["run"] != self.run:
                raise RendezvousError(
                    f"rank {self.launch.rank} of {self.run} finds another run at {self.place}: "
                    f"{owner['run']}, rank 0 on {owner['rank_0']}; {_OWN_PORT}"
                )
        return _within(self.run, store)

    def _listen(self) -> socket.socket:
        """Opens the port of the run: torch would say in 20 lines that it is taken."""
        families = [socket.AF_INET]
        if socket.has_dualstack_ipv6():
            families.insert(0, socket.AF_INET6)
        for family in families:
            try:
                return socket.create_server(
                    ("", self.launch.master_port),
                    family=family,
                    backlog=_BACKLOG,
                    dualstack_ipv6=family is socket.AF_INET6,
                )
            except OSError as error:
                failure = error
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    break
        why = failure.strerror
        if failure.errno == errno.EADDRINUSE:
            why = "the port is taken by another run or program on this host"
        raise RendezvousError(
            f"rank 0 of {self.run} cannot open the rendezvous at {self.place}: {why}; {_OWN_PORT}"
        ) from failure

    def reach(self) -> None:
        """Returns when somebody listens where the store of the run is."""
        address = (self.launch.master_address, self.launch.master_port)
        pause = 0.05
        while True:
            left = self.deadline - time.monotonic()
            try:
                socket.create_connection(address, timeout=max(left, 0.1)).close()
                return
            except OSError as error:
                # a launcher opens its store before it starts processes, and nobody opens it again
                if self._finds_no_launcher(error) and pause >= _LONGEST_PAUSE:
                    raise RendezvousError(
                        f"rank {self.launch.rank}: the launcher is gone: nobody listens at "
                        f"{self.place}, where it keeps the store of the run"
                    ) from error
                if pause > left:
                    raise self._unreachable(error) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _finds_no_launcher(self, error: OSError) -> bool:
        return self.launch.is_store_of_launcher and isinstance(error, ConnectionRefusedError)

    def _unreachable(self, error: OSError) -> RendezvousError:
        what, hint = f"{self.host} did not open the rendezvous", "see what it says itself; "
        if self.is_host:
            what, hint = "rank 0 does not reach itself", ""
        return RendezvousError(
            f"{what} at {self.place} within {self.timeout_seconds:g} s ({_KEY}; {error}): "
            f"{hint}MASTER_ADDR must be its host"
        )

    def _lead(self, store: Any) -> str:
        """Begins a start as rank 0, and lets the others go on when all have come; its name."""
        if store.check([_START]):  # the launcher's store, in which the run was started before
            _, holder = json.loads(store.get(_START))
            if not self._may_be_over(holder):
                raise self._taken_by(holder)
        name = uuid.uuid4().hex
        start = _within(name, store)
        start.set(_key(0), self.claim)
        store.set(_START, json.dumps([name, self.me]))
        self.has_guests = self.is_host
        keys = [_key(rank) for rank in range(self.launch.world_size)]
        for _ in self._polling():
            if start.check(keys):
                for key in keys:
                    start.set(_seen(key), start.get(key).decode())
                return name
            if start.check([_VERDICT]):
                raise RendezvousError(start.get(_VERDICT).decode())
        raise self._give_up(start)

    def _follow(self, store: Any) -> str:
        """Comes to the newest start of rank 0 until that has seen it; the name of the start."""
        own, name, holder, is_old = _key(self.launch.rank), "", "", True
        start: Any = None
        for _ in self._polling():
            # again at every turn: the first one that is found may be that of earlier processes
            newest = json.loads(store.get(_START))[0] if store.check([_START]) else ""
            if newest != name:
                name, start, holder = newest, _within(newest, store), ""
                is_old = self.launch.is_store_of_launcher and (
                    start.check([_seen(own)]) or start.check([_VERDICT])
                )
                if not is_old:
                    holder = self._take_rank(start)
            if is_old:
                continue
            if start.check([_seen(own)]):
                seen = start.get(_seen(own)).decode()
                if seen == self.claim:
                    return name
                holder = holder or seen
            elif start.check([_VERDICT]):
                raise RendezvousError(start.get(_VERDICT).decode())
            # rank 0's own store has one start: there is none to wait for
            if holder and not self.launch.is_store_of_launcher:
                raise self._taken_by(holder)
        if is_old or holder:
            raise self._missing([0], holder)
        raise self._give_up(start)

    def _polling(self) -> Iterator[None]:
        """Goes on until the time is over; polled, as what `store.wait` raises names nobody."""
        pause, left = 0.01, self.timeout_seconds
        while left > 0.0:
            left = self.deadline - time.monotonic()
            yield  # once more after the time is over
            time.sleep(min(pause, max(left, 0.0)))
            pause = min(2 * pause, _LONGEST_PAUSE_OF_STORE)

    def _take_rank(self, start: Any) -> str:
        """Claims the rank, also that of a process that is no more; who holds it, if another."""
        key, expected = _key(self.launch.rank), ""
        while (holder := start.compare_set(key, expected, self.claim).decode()) != self.claim:
            if holder == expected or not self._is_over(holder):
                return holder
            expected = holder
        return ""

    def _taken_by(self, holder: str) -> RendezvousError:
        return RendezvousError(
            f"rank {self.launch.rank} of {self.run} is taken at {self.place} by the "
            f"process on {_who(holder)}; two processes have the same RANK, or the run was "
            f"started twice: end one of them, or {_OWN_PORT}"
        )

    def _is_over(self, holder: str) -> bool:
        """Whether the process that claimed the rank lived on this host, and lives no more."""
        host, _, pid = _who(holder).rpartition(", pid ")
        if host != socket.gethostname():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _may_be_over(self, holder: str) -> bool:
        """Whether it may have ended: of another host nothing is known."""
        return self._is_over(holder) or not holder.startswith(f"{socket.gethostname()}, pid ")

    def _give_up(self, start: Any) -> RendezvousError:
        ranks = range(self.launch.world_size)
        # all came where rank 0 alone did not see it
        missing = [rank for rank in ranks if not start.check([_key(rank)])] or [0]
        error = self._missing(missing)
        start.set(_VERDICT, str(error))  # the others began later: all are told the same
        return error

    def _missing(self, ranks: list[int], holder: str = "") -> RendezvousError:
        names = ", ".join(f"rank {rank}" for rank in ranks)
        text = (
            f"{names} did not join the rendezvous at {self.place} within "
            f"{self.timeout_seconds:g} s ({_KEY}): see what it says itself"
        )
        if holder:
            text += f"; in the start before it, rank {self.launch.rank} was on {_who(holder)}"
        return RendezvousError(text)


def _seen(key: str) -> str:
    """Where rank 0 says whose claim it saw when all had come."""
    return f"{key}/seen"


def _within(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def _who(claim: str) -> str:
    """Host and pid of who made a claim."""
    return claim.partition("\n")[0]


def _key(rank: int) -> str:
    return f"rendezvous/{rank}"


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """Keeps from standard error what torch writes about each attempt that fails, frames included.

    Nothing else may write there meanwhile; what failed is raised, and said in one line.
    """
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
