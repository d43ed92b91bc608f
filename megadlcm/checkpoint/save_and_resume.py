"""Saves a run and resumes it.

A checkpoint holds tensors under parameter names, not DeepSpeed's own files: `model.safetensors`
(fp32 master values and buffers), `optimizer.safetensors` (`<parameter>.exp_avg`, ...) and
`state.json` (counters, resolved config, versions). `run_folder.checkpoints` commits and finds them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.masking import masked_values
from data_pipeline.reading.phases import Phase, first_phase, next_phases
from megadlcm.checkpoint.tensors import read_tensors, write_tensors
from megadlcm.config import ModelConfig, MupConfig, RunConfig, config_to_dict
from megadlcm.engine import masters
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from megadlcm.run_folder import checkpoints, files

logger = logging.getLogger(__name__)

# what a resumed run may not change: the model, the data order, the meaning of the optimizer state
_FIXED_SECTIONS = {"model": ModelConfig, "mup": MupConfig}
_FIXED_KEYS = (
    "seed",
    "data.seq_len",
    "data.seed",
    "data.shuffle_block",
    "training.global_batch_size",
    "training.precision",
    "optimizer.name",
)
_FREE_MODEL_KEYS = ("model.attention_backend", "model.track_threshold")


def save_checkpoint(engine: TrainingEngine, config: RunConfig, state: TrainState) -> Path:
    """Commits a checkpoint of the step just completed and prunes older ones; collective.

    Args:
        engine: the engine.
        config: the resolved run.
        state: counters.

    Returns:
        The folder.
    """
    root = Path(config.output_dir) / files.CHECKPOINTS
    # every process takes part in collecting, also those that then have nothing to write
    model_tensors = masters.read_model(engine)
    optimizer_tensors = masters.read_optimizer(engine)
    folder = root / files.step_name(state.step)
    if engine.mesh.is_writer:
        description = {
            # what a resumed run goes on with; the rest is for people and for `check_continuable`
            "train_state": state.to_dict(),
            "config": masked_values(config_to_dict(config)),
            "layout": {
                "world_size": engine.mesh.world_size,
                "zero_stage": engine.zero_stage,
                "tensor_parallel_size": engine.mesh.tensor_parallel_size,
                "pipeline_parallel_size": engine.mesh.pipeline_parallel_size,
            },
            "versions": _versions(),
        }
        text = json.dumps(description, indent=1)
        writers: Mapping[str, Callable[[Path], Any]] = {
            files.MODEL: lambda path: write_tensors(model_tensors, path),
            files.OPTIMIZER: lambda path: write_tensors(optimizer_tensors, path),
            files.STATE: lambda path: path.write_text(text, encoding="utf-8"),
        }
        tensors = [*model_tensors.values(), *optimizer_tensors.values()]
        num_bytes = sum(tensor.nbytes for tensor in tensors) + len(text)
        checkpoints.commit(root, state.step, writers, num_bytes)
        # only after the commit: the newest complete checkpoint is never the one that goes
        checkpoints.prune(root, config.checkpoint.keep, folder)
    # nobody goes on before the folder has its name: whoever is killed now finds it
    engine.mesh.barrier()
    return folder


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def resume(engine: TrainingEngine, config: RunConfig) -> TrainState | None:
    """Continues from the newest complete, verified checkpoint of the run folder; collective.

    Rank 0 decides which one that is.

    Args:
        engine: a fresh engine.
        config: the resolved run.

    Returns:
        Counters with `restart_count` one higher; None for a fresh run.

    Raises:
        InputError: the config or the data changed in a way that a resumed run cannot follow.
    """
    root = Path(config.output_dir) / files.CHECKPOINTS
    found = None
    if engine.mesh.is_writer:
        # one process looks and tells the others: two could see a folder differently
        checkpoints.remove_unfinished(root)
        newest = checkpoints.newest_verified(root)
        found = None if newest is None else newest.path
    path: Path | None = engine.mesh.broadcast_object(found)
    if path is None:
        return None
    description = checkpoints.read_description(path)
    phases = check_continuable(description, config, path)
    # whole files on every process: each takes the shards it holds
    masters.write_model(engine, read_tensors(path / files.MODEL))
    masters.write_optimizer(engine, read_tensors(path / files.OPTIMIZER))
    state = TrainState.from_dict(description["train_state"])
    # rows of this start can then be told from those that it repeats
    state.restart_count += 1
    state.data_phases = phases
    logger.info("resumed from %s (step %d, start %d)", path, state.step, state.restart_count + 1)
    return state


def fresh_state(config: RunConfig) -> TrainState:
    """Returns the counters of a run that has not begun.

    Args:
        config: the run; the indexes of its train sources are read.

    Returns:
        The counters; the data is in its first phase.
    """
    return TrainState(data_phases=[first_phase(config.data).to_dict()])


def check_continuable(
    description: dict[str, Any], config: RunConfig, path: Path
) -> list[dict[str, Any]]:
    """Refuses a config that the checkpoint cannot continue; other changes are logged.

    Args:
        description: `state.json` of the checkpoint.
        config: the config of this start.
        path: the checkpoint, for the message.

    Returns:
        The data phases of the resumed run.

    Raises:
        InputError: model, data order or precision differ; the message lists the keys.
    """
    # masked as it was saved: a new password is no change
    given = masked_values(config_to_dict(config))
    saved, now = _defaults() | _flat(description["config"]), _flat(given)
    # a key that one side lacks counts as changed: it came with a later version
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    forbidden = [key for key in changed if _is_fixed(key)]
    if forbidden:
        listed = ", ".join(
            f"{key} ({saved.get(key, 'absent')!r} -> {now.get(key, 'absent')!r})"
            for key in forbidden
        )
        raise InputError(
            f"output_dir = {config.output_dir}: its checkpoint {path.name} was made with another "
            f"{listed}; a resumed run cannot change that: set it back, or choose a new output_dir",
            key=forbidden[0],
        )
    phases = _phases_now(TrainState.from_dict(description["train_state"]), config, path)
    for key in changed:
        logger.info("config change on resume: %s: %r -> %r", key, saved.get(key), now.get(key))
    return phases


def _phases_now(state: TrainState, config: RunConfig, path: Path) -> list[dict[str, Any]]:
    """Returns the data phases of a resumed run; raises InputError where its data has changed."""
    if not state.data_phases:
        raise InputError(
            f"output_dir = {config.output_dir}: its checkpoint {path.name} was made by an earlier "
            "version, whose data came in another order; choose a new output_dir",
            key="output_dir",
        )
    earlier = [Phase.from_dict(phase) for phase in state.data_phases]
    try:
        phases = next_phases(earlier, config.data, state.consumed_samples)
    except InputError as error:
        text = f"output_dir = {config.output_dir}: {error}"
        raise InputError(text, key=error.key or "output_dir") from error
    return [phase.to_dict() for phase in phases]


def _defaults() -> dict[str, Any]:
    """Defaults of the fixed sections, for checkpoints that do not know some key yet.

    So the default of a new key there is what the program did before it had the key.
    """
    return {
        f"{name}.{field.name}": field.default
        for name, section in _FIXED_SECTIONS.items()
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    }


def _is_fixed(key: str) -> bool:
    # a back-end computes the same function, so a run may go on with another one
    in_section = key.split(".")[0] in _FIXED_SECTIONS and key not in _FREE_MODEL_KEYS
    return in_section or key in _FIXED_KEYS


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            flat |= _flat(value, name + ".")
        elif name == "data.train":  # a folder may move; what is in it is in the data phases
            flat[name] = [source["weight"] for source in value]
        else:
            flat[name] = value
    return flat
