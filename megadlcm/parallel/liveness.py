"""Names the process that others wait for: a board of heartbeats, and a watch on one's own waiting.

A collective that one process does not join hangs for all others, and what they then see is a
timeout or a closed connection that names nobody. So each process says what it waits for (`doing`,
two attribute writes), and a thread of each process

- writes rank, host, pid, step and the present phase to the store of the run every few seconds;
- ends the process when one phase lasted longer than `parallel.collective_timeout_seconds`, after
  reading from the board who gives no sign of life, who failed, and who is somewhere else.

The thread only reads its own process until then, and the main thread never talks to the store, so
this costs nothing in a step. It also works where the main thread hangs inside of a library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from megadlcm.parallel.signs_of_life import Sign, Store

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_LONGEST_BEAT = 5.0
_BEATS_OF_SILENCE = 3.0
"""Heartbeats without a change after which a process counts as silent."""
_BEATS_OF_HOSTING = 12
"""Heartbeats for which a process that holds the board waits for the others to read it."""
_FAILED = "liveness/failed"
EXIT_CODE = 1


@dataclass
class _Present:
    """What this process does now; written by the main thread, read by the watching one."""

    place: str = "start"
    waits_for: str | None = None
    since: float = 0.0
    broke_in: str | None = None


_present = _Present()


class doing:  # noqa: N801
    """Says what this process waits for while it is entered.

    Args:
        what: name of the collective, such as `data parallel sum`.
    """

    __slots__ = ("outer", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.outer: tuple[str | None, float] = (None, 0.0)

    def __enter__(self) -> None:
        self.outer = (_present.waits_for, _present.since)
        _present.since = time.monotonic()
        _present.waits_for = self.what

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, RuntimeError) and _present.broke_in is None:
            _present.broke_in = self.what
        _present.waits_for, _present.since = self.outer


def arrive(place: str) -> None:
    """Says where in the run this process is, such as `step 12`."""
    _present.place = place


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
        self._host_sign: Sign | None = None
        self._board_is_gone = False
        self._silent: list[int] = []
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self) -> None:
        """Starts heartbeat and watch."""
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Ends them; the process goes on."""
        self._stopped.set()
        self._thread.join(timeout=2 * self.interval)

    def publish_failure(self, message: str) -> None:
        """Tells the others why this process is about to end."""
        self._failure = message
        self._publish()
        self._on_board(lambda: self.store.set(_FAILED, str(self.rank)))
        self._linger()

    def explain(self, error: BaseException) -> str:
        """Finds out why a collective broke, when a connection was closed by somebody.

        Args:
            error: what the collective raised.

        Returns:
            One line that names the processes that failed or are gone, and the collective.
        """
        if threading.current_thread() is threading.main_thread():
            # a launcher that lost a process asks the others to end, which this one is about to do
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        broke_in = _present.broke_in or "a collective operation"
        found = self._find_missing()
        if not found:  # nobody else is the cause: memory, for instance
            self.publish_failure(f"{_first_line(error)} (in {broke_in})")
            return (
                f"{_present.place}: {self._who} failed in {broke_in}, no process is missing; "
                f"the error was: {error}"
            )
        text = f"{_present.place}: {self._who} lost its connection in {broke_in}; {found}"
        self._leave()
        return text

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            self._publish()
            waits_for, since = _present.waits_for, _present.since
            waited = time.monotonic() - since
            if self._host_sign is None:
                self._host_sign = self._on_board(lambda: self._read([0]).get(0))
            if waits_for is None or waited < 2 * self.interval:
                continue
            somebody_failed = self._on_board(lambda: self.store.check([_FAILED]))
            if somebody_failed or waited > self.timeout_seconds:
                self._end_waiting(waits_for, since)

    def _end_waiting(self, waits_for: str, since: float) -> None:
        found = self._find_missing()
        if _present.waits_for is None or _present.since != since or self._stopped.is_set():
            return  # they came after all
        waited = time.monotonic() - since
        limit = ""
        if waited > self.timeout_seconds:
            limit = f", longer than parallel.collective_timeout_seconds = {self.timeout_seconds:g}"
        text = (
            f"{_present.place}: {self._who} waited {waited:.0f} s in {waits_for}{limit}; "
            f"{found or 'every process is alive and waits in the same place'}"
        )
        logger.error("%s", text)
        print(f"error: {text}", file=sys.stderr, flush=True)
        for handler in [*logging.getLogger().handlers, *logger.parent.handlers]:  # type: ignore[union-attr]
            handler.flush()
        self._leave()
        self.end(EXIT_CODE)

    def _leave(self) -> None:
        self._left = True
        self._publish()
        self._linger()

    def _linger(self) -> None:
        """Keeps the board for the others until they are leaving too, if it is in this process."""
        if self.rank != 0 or not self.is_hosted_by_rank_0:
            return
        waiting = set(range(1, self.world_size)) - set(self._silent)
        for _ in range(_BEATS_OF_HOSTING):
            signs = self._on_board(self._read) or {}
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
            self._on_board(lambda: self.store.set(sign.key, json.dumps(sign.__dict__)))

    def _on_board(self, ask: Callable[[], _Answer]) -> _Answer | None:
        """Asks the store; None where it does not answer.

        A store whose host is stopped never answers, whatever its timeout, and keeps the asking
        thread for ever: so that is a thread of its own, and there is no second one after it.
        """
        if self._board_is_gone:
            return None
        answers: list[_Answer] = []

        def run() -> None:
            with contextlib.suppress(Exception):
                answers.append(ask())

        thread = threading.Thread(target=run, name="liveness board", daemon=True)
        thread.start()
        thread.join(timeout=_BEATS_OF_SILENCE * self.interval)
        self._board_is_gone = thread.is_alive()
        return answers[0] if answers else None

    def _read(self, ranks: Iterable[int] | None = None) -> dict[int, Sign]:
        signs = {}
        for rank in range(self.world_size) if ranks is None else ranks:
            key = f"liveness/{rank}"
            if self.store.check([key]):
                signs[rank] = Sign(**json.loads(self.store.get(key)))
        return signs

    def _find_missing(self) -> str:
        """Who failed, who is silent, who is somewhere else; watches a few heartbeats."""
        before = self._on_board(self._read)
        if before is not None and not any(sign.failure for sign in before.values()):
            time.sleep(_BEATS_OF_SILENCE * self.interval)
        after = self._on_board(self._read)
        if before is None or after is None:
            return self._say_board_is_gone()
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        failed = [after[rank] for rank in others if rank in after and after[rank].failure]
        if failed:
            return "; ".join(f"{sign.who} failed: {sign.failure}" for sign in failed)
        silent = [
            rank
            for rank in others
            if rank not in after
            or (rank in before and after[rank].beat == before[rank].beat and not after[rank].left)
        ]
        self._silent = silent
        if silent:
            return "; ".join(self._say_silent(after.get(rank), rank) for rank in silent)
        place, phase = _present.place, _present.waits_for
        elsewhere = [
            after[rank]
            for rank in others
            if not after[rank].left and (after[rank].place, after[rank].waits_for) != (place, phase)
        ]
        return "; ".join(f"{sign.who} is alive in {sign.doing}" for sign in elsewhere)

    def _say_board_is_gone(self) -> str:
        if not self.is_hosted_by_rank_0:
            return "the launcher is gone (it holds the board on which processes show their life)"
        host = self._host_sign.who if self._host_sign is not None else "rank 0"
        state = "gives no sign of life (stopped)" if self._board_is_gone else "is gone"
        return f"{host} {state}: it holds the board on which processes show that they live"

    def _say_silent(self, sign: Sign | None, rank: int) -> str:
        if sign is None:
            return f"rank {rank} never gave a sign of life"
        return (
            f"{sign.who} gives no sign of life (dead, or stopped for more than "
            f"{_BEATS_OF_SILENCE * self.interval:.0f} s); last seen in {sign.doing}"
        )


_watch: Liveness | None = None


def start_watch(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    timeout_seconds: float,
    is_hosted_by_rank_0: bool,
) -> None:
    """Starts heartbeat and watch of this process; nothing to do for a run of one.

    Args:
        rank: index of this process.
        world_size: processes of the run.
        address: host of the store of the run.
        port: its port.
        timeout_seconds: longest phase of waiting.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
    """
    global _watch
    if world_size == 1 or _watch is not None:
        return
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds)
    )
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
