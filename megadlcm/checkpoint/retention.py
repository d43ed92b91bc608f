"""Which checkpoints of a run stay; the others go beside the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.folder import quick_look, step_of
from megadlcm.checkpoint.storage import CheckpointStorage
from megadlcm.config.training import CheckpointConfig

logger = logging.getLogger(__name__)

_SECONDS_AT_END = 20.0


def doomed(
    names: Iterable[str],
    newest_good: str,
    keep: int,
    keep_every: int,
    pins: Iterable[str],
    is_whole: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """Which checkpoints go.

    Args:
        names: all of them, newest first.
        newest_good: one that is known to be whole: it stays. What is newer may be damaged, does
            not count, and stays too.
        keep: how many of the newest stay; 0 keeps all.
        keep_every: those whose step is a multiple stay; 0 for none.
        pins: names that stay.
        is_whole: whether a checkpoint counts as one that stays; damaged ones go with their age.

    Returns:
        Names, oldest first.
    """
    if keep == 0:
        return []
    stays, gone = set(pins), []
    num_kept = 0
    for name in names:
        step = step_of(name)
        assert step is not None
        if num_kept >= keep:
            if name not in stays and not (keep_every and step % keep_every == 0):
                gone.append(name)
        # asked only as long as it matters: on a far storage it takes a moment
        elif name == newest_good or (name < newest_good and is_whole(name)):
            num_kept += 1
    return gone[::-1]


class Retention:
    """Removes checkpoints that need not stay, in a thread of its own; one process of a run has it.

    What cannot be removed is named in the log, and stays. Killed half way, it leaves nothing that
    looks like a checkpoint.

    Args:
        storage: where they lie.
        attempt: this start of the run.
        options: how many stay.
    """

    def __init__(self, storage: CheckpointStorage, attempt: str, options: CheckpointConfig) -> None:
        self.storage, self.attempt, self.options = storage, attempt, options
        self._changed = threading.Condition()
        self._newest_good: str | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def after(self, name: str) -> None:
        """To be called when a checkpoint is there, whole; returns at once."""
        if self.options.keep == 0:
            return
        with self._changed:
            # of several that came meanwhile the last one says it all
            self._newest_good = name
            if self._thread is None:
                # a daemon: a storage that does not answer keeps no process alive
                work = threading.Thread(target=self._work, name="checkpoint removal", daemon=True)
                self._thread = work
                work.start()
            self._changed.notify()

    def close(self, seconds: float = _SECONDS_AT_END) -> None:
        """Waits a while for what is left to do; the next start does what then still is."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                logger.warning("old checkpoints are not all removed; the next start goes on")

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._newest_good is None and not self._closing:
                    self._changed.wait()
                name, self._newest_good = self._newest_good, None
            if name is None:
                return
            try:
                options = self.options
                prune(self.storage, self.attempt, name, options.keep, options.keep_every)
            except (OSError, StorageError, ValueError) as error:
                logger.warning("old checkpoints cannot be removed: %s", error)


def prune(
    storage: CheckpointStorage, attempt: str, newest_good: str, keep: int, keep_every: int = 0
) -> None:
    """Removes what need not stay; what cannot be removed is named in the log, and stays.

    Args:
        storage: where they lie.
        attempt: this start of the run.
        newest_good: see `doomed`, as for the others.
        keep: how many stay.
        keep_every: of which steps others stay.
    """

    def is_whole(name: str) -> bool:
        try:
            quick_look(storage, name)
        except InputError:
            return False
        return True

    for name in doomed(storage.names(), newest_good, keep, keep_every, storage.pins(), is_whole):
        # asked again: a removal takes a while, and a pin may have come
        if name in storage.pins():
            continue
        try:
            storage.remove(name, attempt)
        except (OSError, StorageError) as error:
            logger.warning("checkpoint %s cannot be removed: %s", name, error)
