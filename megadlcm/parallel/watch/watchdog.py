"""Names the process that others wait for: a heartbeat, and a watch on one's own waiting.

A collective that one process does not join hangs for all others, and what they then see is a
timeout or a closed connection that names nobody. So each process says what it waits for
(`activity`), and a thread of each process, its watchdog,

- writes rank, host, pid, step and the present phase to the store of the run every few seconds;
- ends the process when one phase lasted longer than `parallel.collective_timeout_seconds`, after
  reading from the board who sends no heartbeat, who failed, and who is somewhere else.

Computing may take as long as it likes: a process that does not wait, or that also computes in its
phase (a backward pass), ends only if another one failed or sends no heartbeat; so does any process
until its first step is done. That is also what holds with NCCL, whose collectives return before
they are done: the process then waits where it next needs a number from the device, and the line
names its step and not the collective.

The thread only reads its own process until then, and the main thread never talks to the store, so
this costs nothing in a step. It also works where the main thread hangs inside of a library.

A launcher that lost a process tells the others to end within a tenth of a second (SIGTERM). They
say so on the board, so that they are not missed, and end once they have said whom it lost. Where
the launcher itself is gone nobody would end them: they notice and do it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from megadlcm.parallel.watch.activity import THIS_PROCESS, Activity, Phase
from megadlcm.parallel.watch.diagnosis import Findings, find_missing
from megadlcm.parallel.watch.heartbeat import Board, Heartbeat, Store
from megadlcm.parallel.watch.sigterm import SigtermListener

logger = logging.getLogger(__name__)

_LONGEST_INTERVAL = 5.0
_BEATS_OF_SILENCE = 3
"""Heartbeats without a change after which a process counts as silent."""
_TICK_SECONDS = 1.0
"""How soon a new place in the run is shown, so that of who dies it is known where it was."""
_BEATS_OF_HOSTING = 12
"""Heartbeats for which a process that holds the board waits for the others to read it."""
_BEATS_BEFORE_KILL = 5.5
"""Heartbeats in which a process that was told to end does: launchers kill after 30 s."""
EXIT_CODE = 1
EXIT_CODE_OF_SIGTERM = 128 + signal.SIGTERM


class Watchdog:
    """The heartbeat of this process, and the watch on its waiting.

    Args:
        store: a connection of its own to the store of the run.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: longest phase of waiting.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
        is_child_of_launcher: whether it ends when its parent does.
        activity: what the process does, and the clock by which its phases are measured.
        end: ends the process; for tests.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        is_hosted_by_rank_0: bool = True,
        is_child_of_launcher: bool = False,
        activity: Activity = THIS_PROCESS,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self.is_hosted_by_rank_0 = is_hosted_by_rank_0
        self.is_child_of_launcher = is_child_of_launcher
        self.activity, self.clock, self.end = activity, activity.clock, end
        self.interval = min(_LONGEST_INTERVAL, timeout_seconds / 5)
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.board = Board(store, world_size, patience=_BEATS_OF_SILENCE * self.interval)
        self._count, self._left, self._terminated = 0, False, False
        self._is_asked = False
        self._shown_place = ""
        # torchrun starts its workers itself: who has another parent now has lost it
        self._parent = os.getppid()
        self._sigterm = SigtermListener(self.leave_on_request)
        self._failure: str | None = None
        self._host_heartbeat: Heartbeat | None = None
        self._looked = float("-inf")
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # both threads send heartbeats, whose counts must grow
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @property
    def who(self) -> str:
        """Rank, host and pid."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def start(self) -> None:
        """Starts heartbeat and watch."""
        self.send_heartbeat()
        self._sigterm.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends them; the process goes on, and is not missed."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self.interval)
        self._sigterm.stop()
        self._leave()

    def send_heartbeat(self) -> None:
        """Shows the others that this process lives, and what it does."""
        with self._lock:
            self._count += 1
            self._shown_place = self.activity.place
            self.board.show(
                Heartbeat(
                    self.rank,
                    self.host,
                    self.pid,
                    self._count,
                    self._shown_place,
                    self.activity.waits_for,
                    self._failure,
                    self._left,
                    self._terminated,
                )
            )

    def publish_failure(self, message: str) -> None:
        """Tells the others why this process is about to end."""
        self._failure = message
        self.send_heartbeat()
        self.board.show_failure(self.rank)
        self._linger()

    def explain(self, error: BaseException) -> str:
        """Finds out why a collective broke, when a connection was closed by somebody.

        Args:
            error: what the collective raised.

        Returns:
            One line that names the processes that failed or are gone, and the collective.
        """
        broke_in = self.activity.broke_in or "a collective operation"
        found = self.look_around()
        if not found.is_certain:  # nobody else is the cause: memory, for instance
            self.publish_failure(f"{first_line(error)} (in {broke_in})")
            return (
                f"{self.activity.place}: {self.who} failed in {broke_in}, no process is missing; "
                f"the error was: {error}"
            )
        text = f"{self.activity.place}: {self.who} lost its connection in {broke_in}; {found.text}"
        self._leave()
        self._linger(found.silent)
        return text

    def look_around(self) -> Findings:
        """Who failed, who is silent, who is somewhere else; watches a few heartbeats."""
        seconds = _BEATS_OF_SILENCE * self.interval
        before = self.board.read()
        # a failure that is on the board explains everything, and those who failed end soon
        if before is not None and not any(one.failure for one in before.values()):
            for _ in range(_BEATS_OF_SILENCE):
                if self.board.all_leave():  # nobody is missing, and nobody will say more
                    break
                self.clock.sleep(self.interval)
                self.send_heartbeat()  # others may be looking for who is silent
        self._remember_host(before)
        after = self.board.read()
        if before is None or after is None:
            return self._judge_without_board()
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return find_missing(before, after, others, self.activity.phase, seconds)

    def beat(self) -> None:
        """What the thread does at every heartbeat: shows itself, and watches its own waiting."""
        self.send_heartbeat()
        phase, now = self.activity.phase, self.clock.now()
        if self._launcher_is_gone():
            self._say(f"{phase.place}: {self.who} ends: the launcher is gone")
            self.end(EXIT_CODE)
        if self.world_size == 1:
            return  # there is nobody to wait for
        self._remember_host(self.board.read([0]))
        if now - phase.since < 2 * self.interval:
            return
        # a look that found nobody missing is not repeated before another timeout
        is_over = now - max(phase.since, self._looked) > self.timeout_seconds
        if is_over or (not phase.computes and (self.board.has_failure() or self.board.is_gone)):
            self._consider_the_end(phase)

    def leave_on_request(self) -> None:
        """Answers a SIGTERM, in a thread of its own: ends, after saying who is lost, if anybody."""
        self._is_asked = True
        phase, found = self.activity.phase, Findings("", False)
        deadline = self.clock.now() + _BEATS_BEFORE_KILL * self.interval
        if not self._is_about_to_explain:
            self._terminated = True
            self._leave()
            found = self.look_around()
        # the main thread says more; but what it is busy with may never end
        if self._is_about_to_explain and self.clock.wait(
            self._stopped, max(deadline - self.clock.now(), 0.0)
        ):
            return
        lost = "" if found.terminated or not found.is_certain else f"; {found.text}"
        self._say(
            f"{phase.place}: {self.who} was told to end (SIGTERM) in "
            f"{phase.waits_for or 'computing'}{lost}"
        )
        self._linger(found.silent)
        self.end(EXIT_CODE_OF_SIGTERM)

    @property
    def _is_about_to_explain(self) -> bool:
        """Whether the main thread failed, and is going to say why and to end."""
        return self.activity.broke_in is not None or self._failure is not None

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        tick, shown = min(_TICK_SECONDS, self.interval), self.clock.now()
        while not self.clock.wait(self._stopped, tick):
            if self.clock.now() - shown >= self.interval:
                shown = self.clock.now()
                self.beat()
            elif self.activity.place != self._shown_place:
                self.send_heartbeat()

    def _launcher_is_gone(self) -> bool:
        # wherever the store is: torchrun may leave it to rank 0
        if self.is_child_of_launcher and os.getppid() != self._parent:
            return True
        return self.board.is_gone and not self.is_hosted_by_rank_0

    def _consider_the_end(self, phase: Phase) -> None:
        """Ends the process, unless the others are alive and may take longer, or came after all."""
        found = self.look_around()
        waited = self.clock.now() - phase.since
        if self.activity.since != phase.since or self._stopped.is_set():
            return  # they came while the board was being read
        is_over = waited > self.timeout_seconds
        if not found.is_certain and (phase.computes or phase.is_early or not is_over):
            self._looked = self.clock.now()
            return
        limit = ""
        if is_over:
            limit = f", longer than parallel.collective_timeout_seconds = {self.timeout_seconds:g}"
        verb = "has been" if phase.computes else "waited"
        self._leave()  # before anything that may take time
        self._say(
            f"{phase.place}: {self.who} {verb} {waited:.0f} s in {phase.waits_for or 'computing'}"
            f"{limit}; {found.text or 'every process is alive and waits in the same place'}"
        )
        self._linger(found.silent)
        self.end(EXIT_CODE)

    def _say(self, text: str) -> None:
        """Says why the process ends; a full disk or a closed pipe does not keep it from that."""

        def run() -> None:
            with contextlib.suppress(Exception):
                print(f"error: {text}", file=sys.stderr, flush=True)
            if not logger.hasHandlers():  # no log yet: it would go to standard error again
                return
            with contextlib.suppress(Exception):
                logger.error("%s", text)
                above = logger.parent.handlers if logger.parent else []
                for handler in [*logging.getLogger().handlers, *above]:
                    handler.flush()

        # a write to a pipe that nobody empties would hang, and the process with it
        thread = threading.Thread(target=run, name="last words", daemon=True)
        thread.start()
        thread.join(timeout=_BEATS_OF_SILENCE * self.interval)

    def _leave(self) -> None:
        first, self._left = not self._left, True
        self.send_heartbeat()
        if first:
            self.board.show_leaving()

    def _linger(self, silent: tuple[int, ...] = ()) -> None:
        """Keeps the board for the others until they are leaving too, if it is in this process."""
        if self.rank != 0 or not self.is_hosted_by_rank_0:
            return
        waiting = set(range(1, self.world_size)) - set(silent)
        for _ in range(_BEATS_OF_HOSTING):
            shown = self.board.read() or {}
            if all(rank in shown and shown[rank].is_ending for rank in waiting):
                break
            self.clock.sleep(self.interval)
            if self._is_asked:  # a look and two heartbeats are all that there is
                break
        self.clock.sleep(self.interval)  # the last of them may be reading

    def _remember_host(self, shown: Mapping[int, Heartbeat] | None) -> None:
        """Notes what the host of the board shows, for when both are gone."""
        self._host_heartbeat = (shown or {}).get(0) or self._host_heartbeat

    def _judge_without_board(self) -> Findings:
        """What is known when the board does not answer: what its host last showed."""
        host = self._host_heartbeat
        if not self.is_hosted_by_rank_0:
            return Findings("the launcher is gone (it holds the board of heartbeats)", True)
        who = host.who if host is not None else "rank 0"
        if host is not None and host.terminated:  # in order, and the board with it
            text = f"{who} was told to end (SIGTERM) in {host.doing}, and held the board"
            return Findings(text, True, terminated=(0,))
        state = "does not answer (stopped)" if self.board.is_silent else "is gone"
        return Findings(f"{who} {state}: it holds the board of heartbeats", True)


_watchdog: Watchdog | None = None


def start_watch(
    store: Store,
    rank: int,
    world_size: int,
    timeout_seconds: float,
    is_hosted_by_rank_0: bool,
    is_child_of_launcher: bool,
) -> None:
    """Starts heartbeat and watch of this process.

    Args:
        store: a connection of its own to the store of the run.
        rank: index of this process.
        world_size: processes of the run.
        timeout_seconds: longest phase of waiting.
        is_hosted_by_rank_0: whether the store lives and dies with rank 0, not with a launcher.
        is_child_of_launcher: whether it ends when its parent does.
    """
    global _watchdog
    if _watchdog is None:
        launcher = is_hosted_by_rank_0, is_child_of_launcher
        _watchdog = Watchdog(store, rank, world_size, timeout_seconds, *launcher)
        _watchdog.start()


def stop_watch() -> None:
    """Ends heartbeat and watch."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def report_failure(error: BaseException) -> str | None:
    """Tells the others about an error, or finds out from them what it means.

    Args:
        error: what ends this process.

    Returns:
        A line that names other processes, if the error came from one of them; else None.
    """
    if _watchdog is None:
        return None
    is_of_collective = _watchdog.activity.broke_in is not None or is_of_backend(error)
    if is_of_collective and isinstance(error, RuntimeError):
        return _watchdog.explain(error)
    _watchdog.publish_failure(first_line(error))
    return None


def is_of_backend(error: BaseException) -> bool:
    """Whether a collective raised it, one that a library runs on its own account among them."""
    return isinstance(error, dist.DistError) or bool(re.search("gloo|NCCL", str(error)))


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or repr(error)
