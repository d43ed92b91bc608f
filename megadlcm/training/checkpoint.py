"""Saves a run, resumes it, and loads its model on a laptop.

A checkpoint holds tensors under parameter names, not DeepSpeed's own files: `model.safetensors`
(fp32 master values and buffers), `optimizer.safetensors` (`<parameter>.exp_avg`, ...) and
`state.json` (counters, resolved config, versions). `checkpoint_folder` commits and finds them.
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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import InputError
from data_pipeline.phases import Phase, next_phases
from megadlcm.config import RunConfig, config_from_dict, config_to_dict
from megadlcm.model import LanguageModel, build_model
from megadlcm.training import checkpoint_folder, tensors
from megadlcm.training.engine import TrainingEngine
from megadlcm.training.state import TrainState

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CHECKPOINTS = "checkpoints"

# what a resumed run may not change: the model, the data order, the meaning of the optimizer state
_FIXED_SECTIONS = ("model", "mup")
_FIXED_KEYS = (
    "seed",
    "data.seq_len",
    "data.seed",
    "data.shuffle_block",
    "training.global_batch_size",
    "training.precision",
    "optimizer.name",
)
_FREE_MODEL_KEYS = ("model.attention_backend",)


def save_checkpoint(engine: TrainingEngine, config: RunConfig, state: TrainState) -> Path:
    """Commits a checkpoint of the step just completed and prunes older ones; collective.

    Args:
        engine: the engine.
        config: the resolved run.
        state: counters.

    Returns:
        The folder.
    """
    root = Path(config.output_dir) / CHECKPOINTS
    model_tensors = tensors.read_model(engine)
    optimizer_tensors = tensors.read_optimizer(engine)
    folder = root / checkpoint_folder.folder_name(state.step)
    if engine.mesh.is_writer:
        description = {
            "train_state": state.to_dict(),
            "config": config_to_dict(config),
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
            MODEL_FILE: lambda path: save_file(model_tensors, path),
            OPTIMIZER_FILE: lambda path: save_file(optimizer_tensors, path),
            STATE_FILE: lambda path: path.write_text(text, encoding="utf-8"),
        }
        checkpoint_folder.commit(root, state.step, writers)
        checkpoint_folder.prune(root, config.checkpoint.keep, folder)
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
    root = Path(config.output_dir) / CHECKPOINTS
    found = None
    if engine.mesh.is_writer:
        checkpoint_folder.remove_unfinished(root)
        newest = checkpoint_folder.newest_verified(root)
        found = None if newest is None else newest.path
    path: Path | None = engine.mesh.broadcast_object(found)
    if path is None:
        return None
    description = read_description(path)
    phases = check_continuable(description, config, path)
    tensors.write_model(engine, load_file(path / MODEL_FILE))
    tensors.write_optimizer(engine, load_file(path / OPTIMIZER_FILE))
    state = TrainState.from_dict(description["train_state"])
    state.restart_count += 1
    state.data_phases = phases
    logger.info("resumed from %s (step %d, start %d)", path, state.step, state.restart_count + 1)
    return state


def read_description(path: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint folder."""
    description: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    return description


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
    saved, now = _flat(description["config"]), _flat(config_to_dict(config))
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    forbidden = [key for key in changed if _is_fixed(key)]
    if forbidden:
        listed = ", ".join(
            f"{key} ({saved.get(key, 'absent')!r} -> {now.get(key, 'absent')!r})"
            for key in forbidden
        )
        raise InputError(
            f"output_dir = {config.output_dir}: its checkpoint {path.name} was made with another "
            f"{listed}; a resumed run cannot change that: set it back, or choose a new output_dir"
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
            "version, whose data came in another order; choose a new output_dir"
        )
    earlier = [Phase.from_dict(phase) for phase in state.data_phases]
    try:
        phases = next_phases(earlier, config.data, state.consumed_samples)
    except InputError as error:
        raise InputError(f"output_dir = {config.output_dir}: {error}") from error
    return [phase.to_dict() for phase in phases]


def _is_fixed(key: str) -> bool:
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


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Reads model tensors, optimizer tensors and `state.json` of a checkpoint folder."""
    return load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE), read_description(path)


def find_checkpoint(path: str | Path) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: a run folder (its newest complete checkpoint), or a checkpoint folder.

    Returns:
        A complete, verified checkpoint folder.

    Raises:
        InputError: there is none, or the named one is damaged.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        return _newest_good(path / CHECKPOINTS)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name a run folder or a checkpoint folder")
    problem = checkpoint_folder.find_problem(path)
    if problem:
        raise InputError(f"checkpoint {path}: {problem}; name another checkpoint of the run")
    return path


def _newest_good(root: Path) -> Path:
    damaged: list[str] = []
    for _, folder in checkpoint_folder.list_steps(root):
        problem = checkpoint_folder.find_problem(folder)
        if not problem:
            for passed_over in damaged:
                logger.warning("passed over damaged checkpoint %s", passed_over)
            return folder
        damaged.append(f"{folder}: {problem}")
    why = f" ({'; '.join(damaged)})" if damaged else ""
    raise InputError(f"{root} holds no complete checkpoint{why}; name a run that saved one")


def load_model(path: str | Path) -> LanguageModel:
    """Loads the model of a run in fp32 on the CPU, whatever layout wrote it.

    Args:
        path: a run folder, or a checkpoint folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: no complete checkpoint there.
    """
    folder = find_checkpoint(path)
    config = config_from_dict(read_description(folder)["config"])
    # the run may have named a kernel that no CPU has
    shape = dataclasses.replace(config.model, attention_backend="auto")
    model = build_model(shape, config.mup, device=torch.device("meta"))
    model = model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(load_file(folder / MODEL_FILE), strict=True)
    assert not missing and not unexpected
    return model.eval()
