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

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_LONGEST_BEAT = 5.0
_BEATS_OF_SILENCE = 3.0
"""Heartbeats without a change after which a process counts as silent."""
EXIT_CODE = 1


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""
        ...

    def get(self, key: str) -> bytes:
        """Reads a value, waiting for it."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        ...


@dataclass
class _Present:
    """What this process does now; written by the main thread, read by the watching one."""

    place: str = "start"
    waits_for: str | None = None
    since: float = 0.0
    broke_in: str | None = None


_present = _Present()


class doing:
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


@dataclass(frozen=True)
class Sign:
    """One process as the board shows it."""

    rank: int
    host: str
    pid: int
    beat: int
    place: str
    waits_for: str | None
    failure: str | None
    left: bool
    """Whether it ended because of another process."""

    @property
    def who(self) -> str:
        """Rank, host and pid."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Its place and phase."""
        return f"{self.place}, {self.waits_for or 'computing'}"


class Liveness:
    """The heartbeat and the watch of this process.

    Args:
        store: a connection of its own to the store of the run.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: longest phase of waiting.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout_seconds, self.end = timeout_seconds, end
        self.interval = min(_LONGEST_BEAT, timeout_seconds / 5)
        self.host, self.pid = socket.gethostname(), os.getpid()
        self._beat, self._failure, self._left = 0, None, False
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
        self._failure = message  # type: ignore[assignment]
        self._publish()

    def explain(self, error: BaseException) -> str:
        """Finds out why a collective broke, when a connection was closed by somebody.

        Args:
            error: what the collective raised.

        Returns:
            One line that names the processes that failed or are gone, and the collective.
        """
        broke_in = _present.broke_in or "a collective operation"
        found = self._find_missing()
        text = (
            f"{_present.place}: {self._who} lost its connection in {broke_in}; "
            f"{found or f'no process is missing; the error was: {error}'}"
        )
        self._left = True
        self._publish()
        self._linger()
        return text

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            self._publish()
            waits_for, since = _present.waits_for, _present.since
            waited = time.monotonic() - since
            if waits_for is not None and waited > self.timeout_seconds:
                self._end_waiting(waits_for, since)

    def _end_waiting(self, waits_for: str, since: float) -> None:
        found = self._find_missing()
        if _present.waits_for is None or _present.since != since or self._stopped.is_set():
            return  # they came after all
        waited = time.monotonic() - since
        text = (
            f"{_present.place}: {self._who} waited {waited:.0f} s in {waits_for}, longer than "
            f"parallel.collective_timeout_seconds = {self.timeout_seconds:g}; "
            f"{found or 'every process is alive and waits for another collective'}"
        )
        logger.error("%s", text)
        print(f"error: {text}", file=sys.stderr, flush=True)
        for handler in [*logging.getLogger().handlers, *logger.parent.handlers]:  # type: ignore[union-attr]
            handler.flush()
        self._left = True
        self._publish()
        self._linger()
        self.end(EXIT_CODE)

    def _linger(self) -> None:
        """Keeps the board alive for the others, if it lives in this process."""
        if self.rank == 0:
            time.sleep((_BEATS_OF_SILENCE + 2) * self.interval)

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
            try:
                self.store.set(f"liveness/{self.rank}", json.dumps(sign.__dict__))
            except Exception:  # the board is gone: whoever waits will say so
                logger.debug("no heartbeat could be written", exc_info=True)

    def _read(self) -> dict[int, Sign]:
        signs = {}
        for rank in range(self.world_size):
            key = f"liveness/{rank}"
            if self.store.check([key]):
                signs[rank] = Sign(**json.loads(self.store.get(key)))
        return signs

    def _find_missing(self) -> str:
        """Who failed, who is silent, who is somewhere else; watches a few heartbeats."""
        try:
            before = self._read()
            time.sleep(_BEATS_OF_SILENCE * self.interval)
            after = self._read()
        except Exception:
            return "rank 0 is gone (it holds the board on which processes show that they live)"
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
        if silent:
            return "; ".join(self._say_silent(after.get(rank), rank) for rank in silent)
        place, phase = _present.place, _present.waits_for
        elsewhere = [
            after[rank]
            for rank in others
            if not after[rank].left and (after[rank].place, after[rank].waits_for) != (place, phase)
        ]
        return "; ".join(f"{sign.who} is alive in {sign.doing}" for sign in elsewhere)

    def _say_silent(self, sign: Sign | None, rank: int) -> str:
        if sign is None:
            return f"rank {rank} never gave a sign of life"
        return (
            f"{sign.who} gives no sign of life (dead, or stopped for more than "
            f"{_BEATS_OF_SILENCE * self.interval:.0f} s); last seen in {sign.doing}"
        )


_watch: Liveness | None = None


def start_watch(
    rank: int, world_size: int, address: str, port: int, timeout_seconds: float
) -> None:
    """Starts heartbeat and watch of this process; nothing to do for a run of one.

    Args:
        rank: index of this process.
        world_size: processes of the run.
        address: host of the store of the run.
        port: its port.
        timeout_seconds: longest phase of waiting.
    """
    global _watch
    if world_size == 1 or _watch is not None:
        return
    from torch.distributed import TCPStore

    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
    _watch = Liveness(store, rank, world_size, timeout_seconds)
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
    _watch.publish_failure(str(error).strip().splitlines()[0] if str(error) else repr(error))
    return None
