"""The folder below --output where a prepare works: its plan, its parts, and who is at them.

Nothing outside of it changes before all parts are complete (publish.py). Three kinds of locks keep
processes apart: the gate, held for moments in which the folder is set up or published; one that all
who work here share; and one for each part. A killed process holds none of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.output_folder import sync_path, write_durably
from data_pipeline.prepare.parts import PART_FILE, PartState, decode_state
from data_pipeline.prepare.plan import Plan
from data_pipeline.storage.locks import FileLock, try_lock, wait_for_lock

UNFINISHED_FOLDER = ".unfinished"
PLAN_FILE = "plan.json"
GATE_FILE = "gate.lock"
WORKING_FILE = "working.lock"
PART_LOCK = "part.lock"
DIGESTS_FILE = "digests.npy"


class WorkFolder:
    """OUTPUT/.unfinished."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / UNFINISHED_FOLDER
        self._parts = self.folder / "parts"

    @contextmanager
    def gate(self) -> Iterator[None]:
        """Lets one process at a time in; afterwards a folder without a plan is gone."""
        while True:
            self.folder.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed by who went out just now
                lock = wait_for_lock(self.folder / GATE_FILE)
                break
        try:
            yield
        finally:
            if self.read_plan() is None:
                self._remove()
            lock.close()

    def read_plan(self) -> bytes | None:
        try:
            return (self.folder / PLAN_FILE).read_bytes()
        except FileNotFoundError:
            return None

    def begin(self, plan: Plan) -> None:
        """Makes the folder that of a plan, clearing it where it had none; inside the gate."""
        if self.read_plan() is None:
            self.clear()
            # The folders come before the plan: whoever finds a plan may work at once.
            self._parts.mkdir()
            write_durably(self.folder / PLAN_FILE, plan.contents)
            sync_path(self.output)

    def clear(self) -> None:
        """Removes the plan and then all the rest but the gate; inside the gate.

        Raises:
            InputError: other processes are working here.
        """
        lock = try_lock(self.folder / WORKING_FILE)
        if lock is None:
            raise InputError(
                f"--output {self.output}: other processes are preparing it by another plan; wait "
                "for them, stop them, or choose another folder",
                key="--output",
            )
        with lock:
            self._remove_contents()

    def discard(self) -> None:
        """Clears the folder unless others are at it; inside the gate."""
        with contextlib.suppress(InputError):
            self.clear()

    def finish(self) -> None:
        """Removes what is left when all is published, whoever is here; inside the gate.

        Others that are here find the finished shards when they look up.
        """
        self._remove_contents()

    def join(self) -> FileLock:
        """Returns the lock that says that this process works here."""
        return wait_for_lock(self.folder / WORKING_FILE, shared=True)

    def part(self, number: int) -> Path:
        return self._parts / f"{number:06d}"

    def lock_part(self, number: int) -> FileLock | None:
        """Locks a part, None where another process is at it.

        Raises:
            FileNotFoundError: the plan was finished or removed by another process.
        """
        # Fails where the plan was removed meanwhile: the parts folder is gone with it.
        self.part(number).mkdir(exist_ok=True)
        return try_lock(self.part(number) / PART_LOCK)

    def is_complete(self, number: int) -> bool:
        return (self.part(number) / PART_FILE).exists()

    def read_complete(self, number: int) -> PartState | None:
        """Returns the state of a complete part, None where it is not."""
        try:
            return decode_state((self.part(number) / PART_FILE).read_bytes())
        except FileNotFoundError:
            return None

    def holds_work(self) -> bool:
        """Whether more than a beginning is finished here."""
        # A tar without its state counts for nothing, so it is no work either.
        patterns = (f"parts/*/{DIGESTS_FILE}", "parts/*/[0-9]*.json")
        return any(next(self.folder.glob(pattern), None) for pattern in patterns)

    def _remove_contents(self) -> None:
        # The plan goes first: without it the rest counts for nothing, whenever this is killed.
        (self.folder / PLAN_FILE).unlink(missing_ok=True)
        sync_path(self.folder)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != GATE_FILE:
                path.unlink(missing_ok=True)

    def _remove(self) -> None:
        self._remove_contents()
        # The gate goes last, and by the one who holds it: those who wait find a new file, see
        # locks.
        (self.folder / GATE_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process is waiting at a new gate
            os.rmdir(self.folder)
        sync_path(self.output)
