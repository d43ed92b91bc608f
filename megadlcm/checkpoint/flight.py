"""One save of one process: a thread that copies, writes, and never talks to other processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from data_pipeline.errors import StorageError
from megadlcm.checkpoint.format import rank_file_name, write_blocks
from megadlcm.checkpoint.index import Shape
from megadlcm.checkpoint.rank_file import Report, Staging, contents, take_fingerprints
from megadlcm.checkpoint.slices import Slice
from megadlcm.checkpoint.storage import CheckpointStorage, NewFile, abandoned_on_error

Bytes = memoryview | bytes


class CancelledError(StorageError):
    """Another process's part of the save failed."""


class Flight:
    """Work of a save that the steps of the training do not wait for.

    Args:
        name: what the thread is called.
        work: does it; is given the flight, which it tells of its progress.
    """

    def __init__(self, name: str, work: Callable[[Flight], None]) -> None:
        self.problem = ""
        self.is_cancelled = False
        self.progress = time.monotonic()
        """When it last got further."""
        self.copied = threading.Event()
        """Set when the tensors may be changed again."""
        self.done = threading.Event()
        self._work = work
        # a daemon: the end of the process does not wait for a disk that hangs
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Flight:
        """Begins."""
        self._thread.start()
        return self

    def advance(self) -> None:
        """Notes that it got further.

        Raises:
            CancelledError: it is not wanted any more.
        """
        self.progress = time.monotonic()
        if self.is_cancelled:
            raise CancelledError("cancelled")

    def cancel(self, patience: float) -> bool:
        """Ends it where it next gets further; whether it did so in that many seconds."""
        self.is_cancelled = True
        self._thread.join(patience)
        return not self._thread.is_alive()

    def find_problem(self, rank: int, timeout_seconds: float) -> str:
        """Why it failed, or that it hangs; empty if neither."""
        if self.problem:
            return f"rank {rank}: {self.problem}"
        idle = time.monotonic() - self.progress
        if not self.done.is_set() and idle > timeout_seconds:
            return (
                f"rank {rank}: its writer got no further for {idle:.0f} s "
                "(checkpoint.timeout_seconds)"
            )
        return ""

    def _run(self) -> None:
        try:
            self._work(self)
        except Exception as error:  # whatever it is: the main thread asks, and others wait
            self.problem = str(error) or repr(error)
        finally:
            self.copied.set()
            self.done.set()


class RankWriter:
    """Writes the file of this process; a save after the other.

    Args:
        storage: where it goes.
        attempt: this start of the run.
        rank: of this process.
        shapes: of whole tensors, by name.
        staging: the copy from which it is written; None to write from the tensors themselves.
    """

    def __init__(
        self,
        storage: CheckpointStorage,
        attempt: str,
        rank: int,
        shapes: Mapping[str, Shape],
        staging: Staging | None,
    ) -> None:
        self.storage, self.attempt, self.rank = storage, attempt, rank
        self.shapes, self.staging = shapes, staging

    def start(
        self, name: str, slices: Sequence[Slice], keys: Sequence[str], live: bool
    ) -> tuple[Flight, Report]:
        """Begins to write.

        Args:
            name: of the checkpoint.
            slices: what this process saves.
            keys: kinds of optimizer state.
            live: whether the tensors stay as they are until it is done, so that no copy is needed.

        Returns:
            The flight, and the report that is whole when it is done.
        """
        report = Report()

        def work(flight: Flight) -> None:
            if not slices:
                return
            if live or self.staging is None:
                parts = contents(slices, keys, self.shapes, report.fingerprints)
            else:
                staged, whole, copy = self.staging.copy(slices, keys)
                copy()
                flight.copied.set()
                flight.advance()
                report.fingerprints = take_fingerprints(staged, keys, self.shapes)
                parts = iter((whole,))
            file = self.storage.create(name, self.attempt, rank_file_name(self.rank))
            with abandoned_on_error(file):
                report.entry = write_blocks(_Watched(file, flight), parts)
                flight.advance()
                file.finish()

        if self.staging is not None:
            self.staging.follow()
        return Flight("checkpoint", work).start(), report


class _Watched:
    """A file whose writing shows in a flight."""

    def __init__(self, file: NewFile, flight: Flight) -> None:
        self._file, self._flight = file, flight

    def write(self, block: Bytes) -> None:
        self._flight.advance()
        self._file.write(block)
