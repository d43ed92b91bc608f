"""Loads a checkpoint into an engine of any layout, each process the byte ranges that it needs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.folder import Checkpoint
from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.rank_file import add_fingerprints, as_text, take_fingerprints
from megadlcm.checkpoint.reading import BlockReader, ReadJob, ReadVolume, jobs_for
from megadlcm.checkpoint.slices import own_slices, whole_shapes
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import follow_masters, make_states

logger = logging.getLogger(__name__)


class DamageError(InputError):
    """A checkpoint turned out to be damaged while it was loaded."""


def load(engine: TrainingEngine, checkpoint: Checkpoint) -> ReadVolume:
    """Sets parameters, optimizer state and buffers; collective.

    Args:
        engine: the engine, fresh or not; all of it is overwritten.
        checkpoint: what to load, the same on every process.

    Returns:
        What this process read.

    Raises:
        DamageError: on every process, where one found damage: the engine has to be loaded again.
    """
    mesh = engine.mesh
    for fence in engine.fences:
        fence()
    make_states(engine, checkpoint.manifest.keys, checkpoint.description.get("optimizer_step"))
    problem, volume = "", ReadVolume()
    try:
        volume = _read(engine, checkpoint)
    except (InputError, StorageError, OSError) as error:
        problem = f"rank {mesh.rank}: {error}"
    problems = [each for each in mesh.gather_over_run(problem) if each]
    if problems:
        raise DamageError("; ".join(problems))
    follow_masters(engine)
    _compare(engine, checkpoint)
    return volume


def _read(engine: TrainingEngine, checkpoint: Checkpoint) -> ReadVolume:
    keys = checkpoint.manifest.keys
    jobs: list[ReadJob] = []
    bounced: list[tuple[Tensor, Any]] = []
    for each in own_slices(engine, share=False):
        for key, view in each.views.items():
            assert key == MASTER or key in keys
            if view.device.type == "cpu":
                target = view.numpy()
            else:
                target = np.empty(view.numel(), np.float32)
                bounced.append((view, target))
            jobs += jobs_for(checkpoint, each.part, key, target)
    volume = BlockReader(checkpoint.storage, checkpoint.name, checkpoint.manifest.files).run(jobs)
    for view, target in bounced:
        view.copy_(torch.from_numpy(target))
    return volume


def _compare(engine: TrainingEngine, checkpoint: Checkpoint) -> None:
    """Raises where some element did not come to its place; collective."""
    expected = checkpoint.manifest.fingerprints
    if not expected:  # of the first format
        return
    slices = own_slices(engine, share=True)
    own = take_fingerprints(slices, checkpoint.manifest.keys, whole_shapes(engine.partition))
    found = as_text(add_fingerprints(engine.mesh.gather_over_run(own)))
    wrong = [name for name in expected if found.get(name) != expected[name]]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise DamageError(f"after loading, fingerprints differ of {listed}")
