"""Runs that are saved and started again in this process, and what a checkpoint folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megadlcm.checkpoint.save_and_resume import fresh_state, resume, save_checkpoint
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from megadlcm.run_folder import files
from megadlcm.run_folder.checkpoints import read_description
from tests.support.layouts import run_steps
from tests.support.tiny_runs import tiny_engine


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model tensors, optimizer tensors and `state.json` of a checkpoint folder."""
    return load_file(path / files.MODEL), load_file(path / files.OPTIMIZER), read_description(path)


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
