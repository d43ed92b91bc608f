"""How long a store may take: one that sends a byte now and then fails like one that is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE_SECONDS = 60.0
"""Longest that an answer, or the next LEAST_BYTES of a file, may take."""
LEAST_BYTES = 2**20
"""17 kB/s: a slow line brings several times that."""


class GaveUpError(OSError):
    """A call that did not return in time; its thread is still in it."""


class Pace:
    """Fails a file that comes too slowly, wherever in the file that is.

    Only time spent waiting for the store counts, not what is done with the bytes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._bytes, self._seconds = clock, 0, 0.0

    def next(self, read: Callable[[], bytes]) -> bytes:
        """Returns what `read` returns, which is nothing at the end of the file.

        Raises:
            OSError: less than LEAST_BYTES have come in PATIENCE_SECONDS.
        """
        began = self._clock()
        chunk = read()
        self._seconds += self._clock() - began
        self._bytes += len(chunk)
        if self._bytes >= LEAST_BYTES:
            self._bytes, self._seconds = 0, 0.0
        elif chunk and self._seconds > PATIENCE_SECONDS:
            raise OSError(
                f"{self._bytes:,} bytes in {self._seconds:.0f} s, too slow to wait for the rest"
            )
        return chunk


def within_patience(call: Callable[[], Result], num_bytes: int = 0) -> Result:
    """Returns what `call` returns, or leaves it to itself where that takes too long.

    Args:
        call: a call of which nothing is seen until it returns; may go on in a thread of its own.
        num_bytes: what it brings.

    Raises:
        GaveUpError: it has not returned.
    """
    seconds = PATIENCE_SECONDS * max(1.0, num_bytes / LEAST_BYTES)
    outcome: Future[Result] = Future()
    # a daemon: a process that has given up must be able to end
    threading.Thread(target=_settle, args=(outcome, call), name="store", daemon=True).start()
    try:
        if not wait([outcome], seconds).done:
            raise GaveUpError(f"no answer in {seconds:.0f} s")
        return outcome.result()
    finally:
        del outcome  # an exception that holds itself would keep its connection open


def _settle(outcome: Future[Result], call: Callable[[], Result]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
        del outcome
