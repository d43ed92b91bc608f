"""What a process does now, in its own words: where in the run it is, and what it waits for.

Every collective is entered under its name (`doing`), which costs two attribute writes; nothing here
talks to other processes. Names are those of the field, such as `data parallel all-reduce`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from data_pipeline.errors import StorageError
from megadlcm.parallel.watch.clock import Clock, SystemClock

_SLOW_PLACES = 2
"""Start and first step take longer on one process than on another: libraries, caches, compilers."""


@dataclass(frozen=True)
class Phase:
    """What a process does at one moment."""

    place: str
    """Where in the run, such as `step 12`."""
    waits_for: str | None
    """Name of the collective; None while it computes."""
    computes: bool
    """Whether this takes long without other processes too."""
    since: float
    """When the phase began, on the clock of the activity."""
    is_early: bool
    """Whether the first step is not done yet."""


class Activity:
    """What a process does now; written by its main thread, read by the watching one.

    Args:
        clock: tells when a phase began.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.place, self.places = "start", 1
        self.waits_for: str | None = None
        self.computes = True
        # written before the rest of a phase: a watch that reads a new phase with the old beginning
        # would find that it has lasted too long
        self.since = self.clock.now()
        self.broke_in: str | None = None
        """The collective that raised first."""

    @property
    def phase(self) -> Phase:
        """What it does now."""
        # in this order, the inverse of writing: a new name never meets an old beginning
        waits_for, computes = self.waits_for, self.computes
        is_early = self.places <= _SLOW_PLACES
        return Phase(self.place, waits_for, computes, self.since, is_early)

    def arrive(self, place: str) -> None:
        """Says where in the run the process is."""
        self.since = self.clock.now()
        self.place = place
        self.places += 1

    def breaks_in(self, what: str) -> None:
        """Notes that a collective raised; whoever is told to end now says why first.

        From any thread: a backward pass on GPUs has threads of its own.
        """
        if self.broke_in is None:  # what is raised on the way out follows from the first
            self.broke_in = what


THIS_PROCESS = Activity()


class doing:  # noqa: N801
    """Says what this process waits for while it is entered.

    Args:
        what: name of the collective, such as `data parallel all-reduce`.
        computes: whether this takes long without others too, such as a backward pass.
        activity: what is changed; that of this process, but in tests.
    """

    __slots__ = ("activity", "computes", "outer", "what")

    def __init__(
        self, what: str, computes: bool = False, activity: Activity = THIS_PROCESS
    ) -> None:
        self.what, self.computes, self.activity = what, computes, activity
        self.outer: tuple[str | None, bool] = (None, True)

    def __enter__(self) -> None:
        activity = self.activity
        self.outer = (activity.waits_for, activity.computes)
        activity.since = activity.clock.now()
        activity.waits_for, activity.computes = self.what, self.computes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        activity = self.activity
        if kind is not None and _may_come_from_others(kind):
            activity.breaks_in(self.what)
        # who left an inner phase has come further in the outer
        activity.since = activity.clock.now()
        activity.waits_for, activity.computes = self.outer


def _may_come_from_others(kind: type[BaseException]) -> bool:
    """Whether an error may be that of a collective; one of the storage has its own cause."""
    return issubclass(kind, RuntimeError) and not issubclass(kind, StorageError)


def arrive(place: str) -> None:
    """Says where in the run this process is, such as `step 12`."""
    THIS_PROCESS.arrive(place)
