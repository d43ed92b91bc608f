"""Names the process that others wait for: a board of heartbeats, and a watch on one's own waiting.

A collective that one process does not join hangs for all others, and what they then see is a
timeout or a closed connection that names nobody. So each process says what it waits for (`doing`,
two attribute writes), and a thread of each process

- writes rank, host, pid, step and the present phase to the store of the run every few seconds;
- ends the process when one phase lasted longer than `parallel.collective_timeout_seconds`, after
  reading from the board who gives no sign of life, who failed, and who is somewhere else.

Computing may take as long as it likes: a process that does not wait, or that also computes in its
phase (a backward pass), ends only if another one failed or gives no sign of life; so does any
process until its first step is done. That is also what holds with NCCL, whose collectives return
before they are done: the process then waits where it next needs a number from the device, and the
line names its step and not the collective.

The thread only reads its own process until then, and the main thread never talks to the store, so
this costs nothing in a step. It also works where the main thread hangs inside of a library.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from data_pipeline.errors import StorageError
from megadlcm.parallel.watch.heartbeat import Board, Sign, Store

logger = logging.getLogger(__name__)

_LONGEST_BEAT = 5.0
_BEATS_OF_SILENCE = 3
"""Heartbeats without a change after which a process counts as silent."""
_BEATS_OF_HOSTING = 12
"""Heartbeats for which a process that holds the board waits for the others to read it."""
_SLOW_PLACES = 2
"""Start and first step take longer on one process than on another: libraries, caches, compilers."""
EXIT_CODE = 1


@dataclass
class _Present:
    """What this process does now; written by the main thread, read by the watching one."""

    place: str = "start"
    places: int = 1
    waits_for: str | None = None
    computes: bool = True
    since: float = field(default_factory=time.monotonic)  # written first when the phase changes
    broke_in: str | None = None


_present = _Present()


class doing:  # noqa: N801
    """Says what this process waits for while it is entered.

    Args:
        what: name of the collective, such as `data parallel sum`.
        computes: whether this takes long without others too, such as a backward pass.
    """

    __slots__ = ("computes", "outer", "what")

    def __init__(self, what: str, computes: bool = False) -> None:
        self.what, self.computes = what, computes
        self.outer: tuple[str | None, bool] = (None, True)

    def __enter__(self) -> None:
        self.outer = (_present.waits_for, _present.computes)
        _present.since = time.monotonic()
        _present.waits_for, _present.computes = self.what, self.computes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and _may_come_from_others(kind) and _present.broke_in is None:
            _present.broke_in = self.what
            _outlive_launcher()
        _present.since = time.monotonic()  # who left an inner phase has come further in the outer
        _present.waits_for, _present.computes = self.outer


def _may_come_from_others(kind: type[BaseException]) -> bool:
    """Whether an error may be that of a collective; one of the storage has its own cause."""
    return issubclass(kind, RuntimeError) and not issubclass(kind, StorageError)


def arrive(place: str) -> None:
    """Says where in the run this process is, such as `step 12`."""
    _present.since = time.monotonic()
    _present.place = place
    _present.places += 1


@dataclass(frozen=True)
class Findings:
    """What the board says about the other processes."""

    text: str
    """One line; empty where all of them wait in the same place."""
    is_certain: bool
    """Whether one of them failed or gives no sign of life."""


class Liveness:
    """The heartbeat and the watch of this process.

    Args:
        store: a connection of its own to the store of the run.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: longest phase of waiting.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        is_hosted_by_rank_0: bool = True,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout_seconds, self.end = timeout_seconds, end
        self.interval = min(_LONGEST_BEAT, timeout_seconds / 5)
        self.host, self.pid = socket.gethostname(), os.getpid()
        self._beat, self._left = 0, False
        self._failure: str | None = None
        self.is_hosted_by_rank_0 = is_hosted_by_rank_0
        self.board = Board(store, world_size, lambda: _BEATS_OF_SILENCE * self.interval)
        self._host_sign: Sign | None = None
        self._silent: list[int] = []
        self._looked = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Starts heartbeat and watch."""
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Ends them; the process goes on, and is not missed."""
        self._stopped.set()
        self._thread.join(timeout=2 * self.interval)
        self._left = True
        self._publish()

    def publish_failure(self, message: str) -> None:
        """Tells the others why this process is about to end."""
        self._failure = message
        self._publish()
        self.board.show_failure(self.rank)
        self._linger()

    def explain(self, error: BaseException) -> str:
        """Finds out why a collective broke, when a connection was closed by somebody.

        Args:
            error: what the collective raised.

        Returns:
            One line that names the processes that failed or are gone, and the collective.
        """
        broke_in = _present.broke_in or "a collective operation"
        found = self._find_missing()
        if not found.is_certain:  # nobody else is the cause: memory, for instance
            self.publish_failure(f"{_first_line(error)} (in {broke_in})")
            return (
                f"{_present.place}: {self._who} failed in {broke_in}, no process is missing; "
                f"the error was: {error}"
            )
        text = f"{_present.place}: {self._who} lost its connection in {broke_in}; {found.text}"
        self._left = True
        self._publish()
        self._linger()
        return text

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            self._publish()
            waits_for, computes = _present.waits_for, _present.computes
            since, now = _present.since, time.monotonic()
            if self._host_sign is None:
                self._host_sign = (self.board.read([0]) or {}).get(0)
            if now - since < 2 * self.interval:
                continue
            is_over = now - max(since, self._looked) > self.timeout_seconds
            if is_over or (not computes and self.board.has_failure()):
                self._end_waiting(waits_for, since, computes)

    def _end_waiting(self, waits_for: str | None, since: float, computes: bool = False) -> None:
        found = self._find_missing()
        waited = time.monotonic() - since
        if _present.since != since or self._stopped.is_set():
            return  # they came after all
        is_over = waited > self.timeout_seconds
        is_patient = computes or _present.places <= _SLOW_PLACES
        if not found.is_certain and (is_patient or not is_over):
            self._looked = time.monotonic()
            return
        limit = ""
        if is_over:
            limit = f", longer than parallel.collective_timeout_seconds = {self.timeout_seconds:g}"
        verb = "has been" if computes else "waited"
        self._left = True
        self._publish()  # before anything that may take time
        self._say(
            f"{_present.place}: {self._who} {verb} {waited:.0f} s in {waits_for or 'computing'}"
            f"{limit}; {found.text or 'every process is alive and waits in the same place'}"
        )
        self._linger()
        self.end(EXIT_CODE)

    def _say(self, text: str) -> None:
        """Says why the process ends; a full disk or a closed pipe does not keep it from that."""

        def run() -> None:
            with contextlib.suppress(Exception):
                print(f"error: {text}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                logger.error("%s", text)
                above = logger.parent.handlers if logger.parent else []
                for handler in [*logging.getLogger().handlers, *above]:
                    handler.flush()

        thread = threading.Thread(target=run, name="liveness last words", daemon=True)
        thread.start()
        thread.join(timeout=_BEATS_OF_SILENCE * self.interval)

    def _linger(self) -> None:
        """Keeps the board for the others until they are leaving too, if it is in this process."""
        if self.rank != 0 or not self.is_hosted_by_rank_0:
            return
        waiting = set(range(1, self.world_size)) - set(self._silent)
        for _ in range(_BEATS_OF_HOSTING):
            signs = self.board.read() or {}
            if all(rank in signs and signs[rank].is_ending for rank in waiting):
                break
            time.sleep(self.interval)
        time.sleep(self.interval)  # the last of them may be reading

    # -- the board --------------------------------------------------------------------------------

    @property
    def _who(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def _publish(self) -> None:
        with self._lock:
            self._beat += 1
            sign = Sign(
                self.rank,
                self.host,
                self.pid,
                self._beat,
                _present.place,
                _present.waits_for,
                self._failure,
                self._left,
            )
            self.board.show(sign)

    def _find_missing(self) -> Findings:
        """Who failed, who is silent, who is somewhere else; watches a few heartbeats."""
        before = self.board.read()
        if before is not None and not any(sign.failure for sign in before.values()):
            for _ in range(_BEATS_OF_SILENCE):
                time.sleep(self.interval)
                self._publish()  # others may be looking for who is silent
        after = self.board.read()
        if before is None or after is None:
            return Findings(self._say_board_is_gone(), True)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        failed = [after[rank] for rank in others if rank in after and after[rank].failure]
        if failed:
            text = "; ".join(f"{sign.who} failed: {sign.failure}" for sign in failed)
            return Findings(text, True)
        silent = [
            rank
            for rank in others
            if rank not in after
            or (rank in before and after[rank].beat == before[rank].beat and not after[rank].left)
        ]
        self._silent = silent
        if silent:
            text = "; ".join(self._say_silent(after.get(rank), rank) for rank in silent)
            return Findings(text, True)
        place, phase = _present.place, _present.waits_for
        elsewhere = [
            after[rank]
            for rank in others
            if not after[rank].left and (after[rank].place, after[rank].waits_for) != (place, phase)
        ]
        text = "; ".join(f"{sign.who} is alive in {sign.doing}" for sign in elsewhere)
        return Findings(text, False)

    def _say_board_is_gone(self) -> str:
        if not self.is_hosted_by_rank_0:
            return "the launcher is gone (it holds the board on which processes show their life)"
        host = self._host_sign.who if self._host_sign is not None else "rank 0"
        state = "gives no sign of life (stopped)" if self.board.is_silent else "is gone"
        return f"{host} {state}: it holds the board on which processes show that they live"

    def _say_silent(self, sign: Sign | None, rank: int) -> str:
        if sign is None:
            return f"rank {rank} never gave a sign of life"
        return (
            f"{sign.who} gives no sign of life (dead, or stopped for more than "
            f"{_BEATS_OF_SILENCE * self.interval:.0f} s); last seen in {sign.doing}"
        )


_watch: Liveness | None = None


def _outlive_launcher() -> None:
    """Lets a process whose collective broke say why before it ends.

    A launcher that lost a process asks the others to end within a tenth of a second, while this one
    still closes its files; it is about to end by itself.
    """
    if _watch is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def start_watch(
    store: Store, rank: int, world_size: int, timeout_seconds: float, is_hosted_by_rank_0: bool
) -> None:
    """Starts heartbeat and watch of this process.

    Args:
        store: a connection of its own to the store of the run.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: longest phase of waiting.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
    """
    global _watch
    if _watch is None:
        _watch = Liveness(store, rank, world_size, timeout_seconds, is_hosted_by_rank_0)
        _watch.start()


def stop_watch() -> None:
    """Ends heartbeat and watch."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def report_failure(error: BaseException) -> str | None:
    """Tells the others about an error, or finds out from them what it means.

    Args:
        error: what ends this process.

    Returns:
        A line that names other processes, if the error came from one of them; else None.
    """
    if _watch is None:
        return None
    if _present.broke_in is not None and isinstance(error, RuntimeError):
        return _watch.explain(error)
    _watch.publish_failure(_first_line(error))
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or repr(error)
