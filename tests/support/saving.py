"""Saves a run in the middle of a test."""

from __future__ import annotations

import uuid
from pathlib import Path

from megadlcm.checkpoint.folder import storage_of
from megadlcm.checkpoint.save import Saver
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState


def save_checkpoint(engine: TrainingEngine, config: RunConfig, state: TrainState) -> Path:
    """Commits a checkpoint of the step just completed, as a start of its own; its folder."""
    storage = storage_of(config)
    attempt = engine.mesh.broadcast_object(uuid.uuid4().hex)
    saver = Saver(engine, config, storage, attempt)
    folder = Path(storage.where(saver.save(state)))
    saver.close()
    engine.fences.remove(saver.fence)
    return folder
