"""Runs that are saved and started again in this process, and what a checkpoint folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadlcm.checkpoint.folder import (
    Checkpoint,
    find_checkpoint,
    open_checkpoint,
    step_of,
    storage_of,
)
from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.index import Range
from megadlcm.checkpoint.reading import BlockReader, jobs_for
from megadlcm.checkpoint.resume import fresh_state, resume
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.checkpoint.verifying import verify
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from tests.support.layouts import run_steps
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine


def newest_folder(run_folder: str | Path) -> Path:
    """The newest checkpoint of a run that is not seen to be damaged."""
    return Path(storage_of(run_folder).where(find_checkpoint(run_folder).name))


def problems(run_folder: str | Path) -> dict[int, str]:
    """What a full verify says of each checkpoint of a run, by step, newest first."""
    storage = storage_of(run_folder)
    verdicts = [verify(storage, name) for name in storage.names()]
    assert not any(verdict.is_gone for verdict in verdicts)
    return {step_of(verdict.name) or 0: verdict.problem for verdict in verdicts}


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model tensors, optimizer tensors and `state.json` of a checkpoint folder."""
    checkpoint = open_checkpoint(LocalStorage(path.parent), path.name)
    index, model, optimizer = checkpoint.index, dict[str, Tensor](), dict[str, Tensor]()
    for number, name in enumerate(index.names):
        model[name] = whole_tensor(checkpoint, name, MASTER)
        for key in checkpoint.manifest.keys if number < index.num_parameters else ():
            optimizer[f"{name}.{key}"] = whole_tensor(checkpoint, name, key)
    step = checkpoint.description["optimizer_step"]
    if step is not None:
        for name in index.names[: index.num_parameters]:
            optimizer[f"{name}.step"] = torch.tensor(float(step))
    return model, optimizer, checkpoint.description


def whole_tensor(checkpoint: Checkpoint, name: str, key: str) -> Tensor:
    """A tensor of a checkpoint, whatever its slices."""
    shape = checkpoint.index.shapes[name]
    whole = torch.empty(shape)
    part = Range.whole(name, shape)
    jobs = jobs_for(checkpoint, part, key, whole.view(-1).numpy())
    BlockReader(checkpoint.storage, checkpoint.name, checkpoint.manifest.files).run(jobs)
    return whole


def train(config: RunConfig, num_steps: int, save_at: tuple[int, ...] = ()) -> TrainingEngine:
    """Trains from scratch and saves after some of the steps."""
    engine, state = tiny_engine(config), fresh_state(config)
    for _ in range(num_steps):
        run_steps(engine, config, state, 1)
        if state.step in save_at:
            save_checkpoint(engine, config, state)
    return engine


def start_again(config: RunConfig) -> tuple[TrainingEngine, TrainState]:
    """A fresh engine that goes on from the newest checkpoint of its run."""
    engine = tiny_engine(config)
    state = resume(engine, config)
    assert state is not None
    return engine, state
