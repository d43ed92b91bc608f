"""How far long work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from data_pipeline.masking import masked
from data_pipeline.tables import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0


def say(line: str) -> None:
    """Prints a line where progress is shown, before work that cannot tell how far it has come."""
    print(printable(masked(line)), file=sys.stderr, flush=True)


class LineLimit:
    """Keeps plain lines apart, so that a log file stays short.

    Args:
        seconds: least time between two of them.
        at_once: whether the first may come at once, or after that time, too.
    """

    def __init__(self, seconds: float, *, at_once: bool) -> None:
        self._seconds = seconds
        self._last = -math.inf if at_once else time.monotonic()

    def allows(self, *, always: bool = False) -> bool:
        """Whether a line may come now, which then counts as one; `always`: whatever the time."""
        now = time.monotonic()
        if always or now - self._last >= self._seconds:
            self._last = now
            return True
        return False


class Bar:
    """A bar on stderr with a text beside it and the time that is left; see `open_bar`."""

    def __init__(self, bar: RichProgress, title: str, total: int, done: int, text: str) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, completed=done, text=text)
        bar.start()

    def update(self, done: int, text: str) -> None:
        self._bar.update(self._task, completed=done, text=text)

    def say(self, line: str) -> None:
        """Prints a line above the bar, as it is: brackets are no markup."""
        self._bar.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def open_bar(title: str, total: int, done: int, text: str) -> Bar | None:
    """Returns a bar where stderr is a terminal, else None.

    Args:
        title: what is done; rich's markup.
        total: all there is to do.
        done: how much of it is done already.
        text: shown beside the bar until the first update; rich's markup.
    """
    if not sys.stderr.isatty():
        return None
    from rich.console import Console  # plain logs do without it
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    bar = RichProgress(*columns, console=Console(stderr=True))
    return Bar(bar, title, total, done, text)


class Progress:
    """Shows a share done, a rate and the time left on stderr; a context manager.

    Args:
        title: what is done.
        total: all there is to do.
        unit: what the rate counts.
        done: done by an earlier start.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done_earlier = done
        self._started = time.monotonic()
        self._lines = LineLimit(LINE_SECONDS, at_once=False)
        self._bar: Bar | None = None
        self._latest: tuple[int, int] | None = None

    def __enter__(self) -> Progress:
        self._bar = open_bar(self._title, self._total, 0, f"{0:4.0%}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the bar; a finished job says what it did, if it did anything."""
        if self._bar is not None:
            self._bar.close()
        # A failure speaks for itself; a last line before it would look like success.
        if kind is None and self._latest is not None and self._latest[1]:
            self._print_line(*self._latest)

    def update(self, done: int, count: int) -> None:
        """Tells the state: `done` of the total, `count` units of the rate."""
        self._latest = (done, count)
        if self._bar is not None:
            self._bar.update(done, f"{self._share(done):4.0%}  {self._rate(count)}")
        elif self._lines.allows():
            self._print_line(done, count)

    def _share(self, done: int) -> float:
        return done / self._total if self._total else 1.0

    def _rate(self, count: int) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{count:,} {self._unit}, {count / seconds:,.0f} {self._unit}/s"

    def _print_line(self, done: int, count: int) -> None:
        share = self._share(done)
        elapsed = time.monotonic() - self._started
        # What lay there already says nothing of how fast this process is.
        own = done - self._done_earlier
        left = (
            f", {elapsed * (self._total - done) / own:.0f} s left" if own > 0 and share < 1 else ""
        )
        say(f"{self._title}: {share:.0%}, {self._rate(count)}, {elapsed:.0f} s{left}")
