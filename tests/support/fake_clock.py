"""A clock that never sleeps: what others do in the meantime is called instead."""

from __future__ import annotations

import threading
from collections.abc import Callable


class FakeClock:
    """Starts at a thousand seconds.

    Args:
        tick: length of the steps in which time passes.
    """

    def __init__(self, tick: float = 1.0) -> None:
        self.tick = tick
        self.others: list[Callable[[], object]] = []
        """Called at every tick of a sleep."""
        self._ticks = 0

    def now(self) -> float:
        return 1000.0 + self._ticks * self.tick

    def sleep(self, seconds: float) -> None:
        for _ in range(max(1, round(seconds / self.tick))):
            self._ticks += 1
            for other in self.others:
                other()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.sleep(seconds)
        return event.is_set()
