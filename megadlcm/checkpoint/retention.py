"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging

from data_pipeline.errors import StorageError
from megadlcm.checkpoint.folder import step_of
from megadlcm.checkpoint.storage import CheckpointStorage

logger = logging.getLogger(__name__)


def doomed(
    names: list[str], newest_good: str, keep: int, keep_every: int, pins: set[str]
) -> list[str]:
    """Which checkpoints go.

    Args:
        names: all of them, newest first.
        newest_good: one that is known to be whole: it stays. What is newer may be damaged, does
            not count, and stays too.
        keep: how many of the newest stay; 0 keeps all.
        keep_every: those whose step is a multiple stay; 0 for none.
        pins: names that stay.

    Returns:
        Names, oldest first.
    """
    if keep == 0:
        return []
    older = [name for name in names if name <= newest_good]
    gone = []
    for name in older[keep:]:
        step = step_of(name)
        assert step is not None
        if name != newest_good and name not in pins and not (keep_every and step % keep_every == 0):
            gone.append(name)
    return gone[::-1]


def prune(
    storage: CheckpointStorage, attempt: str, newest_good: str, keep: int, keep_every: int = 0
) -> None:
    """Removes what need not stay; what cannot be removed is named in the log, and stays."""
    for name in doomed(storage.names(), newest_good, keep, keep_every, storage.pins()):
        try:
            storage.remove(name, attempt)
        except (OSError, StorageError) as error:
            logger.warning("checkpoint %s cannot be removed: %s", name, error)
