"""Progress of long data work: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

LINE_SECONDS = 10.0


def say(line: str) -> None:
    """Prints a line where progress is shown, before work that cannot tell how far it has come."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows a share done, a rate and the time left on stderr; a context manager."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        """Starts at `done` of `total`, done earlier; `unit` names what the rate counts."""
        self._title, self._total, self._unit = title, total, unit
        self._done_earlier = done
        self._started = time.monotonic()
        self._last_line = self._started
        self._update_bar: Callable[[int, str], object] | None = None
        self._stop_bar: Callable[[], object] | None = None
        self._latest: tuple[int, int] | None = None

    def __enter__(self) -> Progress:
        """Opens the bar where stderr is a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console  # plain logs do without it
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%  {task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            bar = Bar(*columns, console=Console(stderr=True))
            task = bar.add_task(self._title, total=self._total, rate="")
            bar.start()
            self._update_bar = lambda done, rate: bar.update(task, completed=done, rate=rate)
            self._stop_bar = bar.stop
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar; a finished job says what it did, if it did anything."""
        if self._stop_bar is not None:
            self._stop_bar()
        if kind is None and self._latest is not None and self._latest[1]:
            self._print_line(*self._latest)

    def update(self, done: int, count: int) -> None:
        """Tells the state: `done` of the total, `count` units of the rate."""
        self._latest = (done, count)
        if self._update_bar is not None:
            self._update_bar(done, self._rate(count))
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line(done, count)

    def _rate(self, count: int) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{count:,} {self._unit}, {count / seconds:,.0f} {self._unit}/s"

    def _print_line(self, done: int, count: int) -> None:
        self._last_line = time.monotonic()
        share = done / self._total if self._total else 1.0
        elapsed = self._last_line - self._started
        own = done - self._done_earlier
        left = (
            f", {elapsed * (self._total - done) / own:.0f} s left" if own > 0 and share < 1 else ""
        )
        say(f"{self._title}: {share:.0%}, {self._rate(count)}, {elapsed:.0f} s{left}")
