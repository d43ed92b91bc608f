"""A request to end (SIGTERM) reaches a thread, whatever the main thread does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class SigtermListener:
    """Answers SIGTERM in a thread of its own for as long as it listens.

    Python runs handlers in the main thread only, between two of its instructions: not while a
    library waits for a collective there. The number of the signal is written to a pipe at once.

    Args:
        answer: called for each SIGTERM, in the thread.
    """

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer
        self._ends: tuple[int, int] | None = None
        self._before: tuple[Any, int] = (signal.SIG_DFL, -1)

    def start(self) -> None:
        """Begins to listen; in other threads than the main one, which may not, does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._ends = read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        handler = signal.signal(signal.SIGTERM, _is_answered_elsewhere)
        earlier_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._before = (signal.SIG_DFL if handler is None else handler, earlier_end)
        _listening.append(self)
        # a daemon: a process that ends does not wait for a signal
        threading.Thread(target=self._run, args=(read_end,), name="sigterm", daemon=True).start()

    def stop(self) -> None:
        """Puts back what was there before."""
        if self._ends is None or threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._before[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._before[0])
        os.close(self._ends[1])  # the end of the pipe ends the thread, which closes its own
        self._ends = None
        _listening.remove(self)

    def _run(self, read_end: int) -> None:
        with contextlib.closing(os.fdopen(read_end, "rb", buffering=0)) as pipe:
            # every signal with a handler in Python comes this way
            while numbers := pipe.read(64):
                if signal.SIGTERM in numbers:
                    self._answer()


def _is_answered_elsewhere(number: int, frame: FrameType | None) -> None:
    """The handler of the main thread; without one the process would be gone."""


_listening: list[SigtermListener] = []


def _hold_back() -> None:
    # a child has the pipe too: until it has let go of it, its SIGTERM would be its parent's
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _go_on() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _let_go() -> None:
    if _listening:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _go_on()
        _listening.clear()


os.register_at_fork(before=_hold_back, after_in_parent=_go_on, after_in_child=_let_go)
