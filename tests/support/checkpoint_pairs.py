"""Checkpoints of every layout, loaded on every other one; what ranks do, collective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.checkpoint.folder import open_checkpoint, storage_of
from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.load import load
from megadlcm.checkpoint.slices import own_slices, piece_of
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from tests.support import gathering
from tests.support.layouts import no_parameter_is_too_small_to_be_partitioned, run_steps
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine


@dataclass(frozen=True)
class Pair:
    """What came of loading one layout's checkpoint on another layout."""

    unequal: tuple[str, ...]
    """Of which this process does not hold exactly what was saved."""
    wanted: int
    """Bytes that this process asked for."""
    read: int
    """Bytes that it read."""
    loss: float
    """Of the next step."""


def save_all(configs: dict[str, RunConfig]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint of each after two steps; the tensors, gathered by DeepSpeed's own means."""
    saved = {}
    with no_parameter_is_too_small_to_be_partitioned():
        for name, config in configs.items():
            engine, state = tiny_engine(config), TrainState()
            run_steps(engine, config, state, 2)
            save_checkpoint(engine, config, state)
            saved[name] = engine.mesh.broadcast_object(whole(engine))
    return saved


def load_all(
    sources: dict[str, RunConfig],
    targets: dict[str, RunConfig],
    saved: dict[str, dict[str, Tensor]],
    steps: int = 1,
) -> dict[tuple[str, str], Pair]:
    """Loads the checkpoint of each source on each target."""
    pairs = {}
    with no_parameter_is_too_small_to_be_partitioned():
        for target, config in targets.items():
            engine = tiny_engine(config)
            for source, other in sources.items():
                pairs[source, target] = _load(engine, config, other, saved[source], steps)
    return pairs


def _load(
    engine: TrainingEngine,
    config: RunConfig,
    source: RunConfig,
    saved: dict[str, Tensor],
    steps: int,
) -> Pair:
    storage = storage_of(source.output_dir)
    checkpoint = open_checkpoint(storage, storage.names()[0])
    volume = load(engine, checkpoint)
    unequal = tuple(find_unequal(engine, saved))
    loss = 0.0
    if steps:
        (step,) = run_steps(engine, config, TrainState(2, 8), steps)
        loss = step.loss
    return Pair(unequal, volume.wanted, volume.read, loss)


def find_unequal(engine: TrainingEngine, saved: dict[str, Tensor]) -> Iterator[str]:
    """What this process holds that is not bit-equal to its part of whole tensors."""
    for each in own_slices(engine, share=False):
        piece = each.part.piece
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        for key, view in each.views.items():
            name = each.part.tensor if key == MASTER else f"{each.part.tensor}.{key}"
            expected = saved[name][box].reshape(-1)[each.part.start : each.part.stop]
            if not torch.equal(view.cpu(), expected):
                yield name
    if engine.zero_stage == 3:
        return  # what it computes with is gathered anew for each pass
    for name, parameter in engine.model.named_parameters():
        piece = piece_of(engine.partition.specs[name], engine.mesh)
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        if not torch.equal(parameter.cpu(), saved[name][box].to(parameter.dtype)):
            yield f"{name} as it computes"


def whole(engine: TrainingEngine) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state, gathered on rank 0."""
    return gathering.read_model(engine) | gathering.read_optimizer(engine)
