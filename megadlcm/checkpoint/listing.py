"""What there is in a folder of checkpoints, from manifests alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.folder import quick_look, step_of
from megadlcm.checkpoint.format import Manifest
from megadlcm.checkpoint.storage import CheckpointStorage


@dataclass(frozen=True)
class Listed:
    """A checkpoint, or what bears the name of one."""

    name: str
    step: int
    """As its name says."""
    manifest: Manifest | None
    """None where it is damaged."""
    problem: str
    """What is wrong with it; empty where nothing is seen."""
    is_pinned: bool
    is_newest: bool
    """Whether it is the newest that is not damaged: the next start begins with it."""


def list_checkpoints(storage: CheckpointStorage) -> Iterator[Listed]:
    """What may be a checkpoint, newest first; reads manifests, and looks at the sizes of files."""
    try:
        pins = storage.pins()
    except (OSError, StorageError, ValueError):
        pins = set()
    has_newest = False
    for name in storage.names():
        step = step_of(name)
        assert step is not None
        manifest, problem = None, ""
        try:
            manifest = quick_look(storage, name)
        except InputError as error:
            problem = str(error)
            if name not in storage.names():
                continue  # removed meanwhile
        yield Listed(name, step, manifest, problem, name in pins, not (problem or has_newest))
        has_newest = has_newest or not problem
