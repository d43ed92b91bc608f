"""Resumes a run from its newest checkpoint that can be trusted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked, masked_values
from data_pipeline.reading.phases import Phase, first_phase, next_phases
from megadlcm.checkpoint.folder import (
    Checkpoint,
    candidates,
    name_passed_over,
    saved_place,
    storage_of,
)
from megadlcm.checkpoint.load import DamageError, load
from megadlcm.checkpoint.storage import CheckpointStorage
from megadlcm.config import ModelConfig, MupConfig, RunConfig, config_to_dict
from megadlcm.config.training import OPTIMIZERS
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState

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


def resume(
    engine: TrainingEngine, config: RunConfig, storage: CheckpointStorage | None = None
) -> TrainState | None:
    """Continues from the newest complete, verified checkpoint of the run folder; collective.

    Rank 0 decides which one that is; what turns out to be damaged is named and passed over.

    Args:
        engine: a fresh engine.
        config: the resolved run.
        storage: where the checkpoints are; None means where the config says.

    Returns:
        Counters with `restart_count` one higher; None for a fresh run.

    Raises:
        InputError: the config or the data changed in a way that a resumed run cannot follow; there
            are checkpoints and none of them can be loaded; or they are where the run saved before.
    """
    storage = storage or storage_of(config)
    mesh, damaged = engine.mesh, list[str]()
    # one process looks and tells the others: two could see a folder differently
    choices = _good(storage, damaged) if mesh.is_writer else iter(())
    while True:
        chosen, damaged_now, problem = mesh.broadcast_object(
            _next(choices, damaged, config if mesh.is_writer else None)
        )
        if problem is not None:
            raise problem
        if chosen is None:
            if damaged_now:
                raise _no_good_one(config, storage, damaged_now)
            return None
        path = storage.where(chosen.name)
        phases = check_continuable(chosen.description, config, chosen.name)
        try:
            _check_states(chosen, config)
            load(engine, chosen)
        except DamageError as error:
            damaged.append(f"{chosen.name}: {error}")
            continue
        if mesh.is_writer:
            name_passed_over(damaged)
        state = TrainState.from_dict(chosen.description["train_state"])
        # rows of this start can then be told from those that it repeats
        state.restart_count += 1
        state.data_phases = phases
        start = state.restart_count + 1
        logger.info("resumed from %s (step %d, start %d)", path, state.step, start)
        return state


def _check_states(chosen: Checkpoint, config: RunConfig) -> None:
    """Raises DamageError where the optimizer would begin anew without a word."""
    wanted = OPTIMIZERS[config.optimizer.name].num_moments
    if len(chosen.manifest.keys) != wanted:
        found = ", ".join(chosen.manifest.keys) or "none"
        raise DamageError(f"its optimizer state is not that of {config.optimizer.name} ({found})")


def _good(storage: CheckpointStorage, damaged: list[str]) -> Iterator[Checkpoint]:
    """Checkpoints that pass the quick check, newest first; others are put on the list."""
    for name, found in candidates(storage):
        if isinstance(found, Checkpoint):
            yield found
        else:
            damaged.append(f"{name}: {found}")


def _next(
    choices: Iterator[Checkpoint], damaged: list[str], config: RunConfig | None
) -> tuple[Checkpoint | None, list[str], Exception | None]:
    """The next choice, what was passed over until now, and why none can be looked for.

    Args:
        choices: good ones, newest first.
        damaged: what was passed over.
        config: of the process that looks.
    """
    try:
        chosen = next(choices, None)
        if chosen is None and not damaged and config is not None:
            _check_not_elsewhere(config)
        return chosen, damaged, None
    except InputError as error:
        return None, damaged, error
    except (OSError, StorageError) as error:
        # not known is not none: a start from scratch would bury what is there
        problem = f"its checkpoints cannot be listed ({error}); look after the disk"
        assert config is not None
        return None, damaged, StorageError(f"output_dir = {config.output_dir}: {problem}")


def _no_good_one(config: RunConfig, storage: CheckpointStorage, damaged: list[str]) -> InputError:
    return InputError(
        f"output_dir = {config.output_dir}: it has checkpoints, and none can be loaded "
        f"({'; '.join(damaged)}); restore one of them, remove {storage.where()} to start from "
        "scratch, or choose another output_dir",
        key="output_dir",
    )


def _check_not_elsewhere(config: RunConfig) -> None:
    """Raises InputError where the run has checkpoints in the place to which it saved before."""
    place = config.checkpoint.folder
    # saved without its password
    if saved_place(Path(config.output_dir)) == (None if place is None else masked(place)):
        return
    earlier = storage_of(config.output_dir)
    names = earlier.names()
    if names:
        raise InputError(
            f"checkpoint.folder = {place}: it has no checkpoint, and the run has some in "
            f"{earlier.where()} (the newest is {names[0]}); copy them, set it back, or choose "
            "another output_dir to start from scratch",
            key="checkpoint.folder",
        )


def fresh_state(config: RunConfig) -> TrainState:
    """Returns the counters of a run that has not begun.

    Args:
        config: the run; the indexes of its train sources are read.

    Returns:
        The counters; the data is in its first phase.
    """
    return TrainState(data_phases=[first_phase(config.data).to_dict()])


def check_continuable(
    description: dict[str, Any], config: RunConfig, name: str
) -> list[dict[str, Any]]:
    """Refuses a config that the checkpoint cannot continue; other changes are logged.

    Args:
        description: `state.json` of the checkpoint.
        config: the config of this start.
        name: of the checkpoint, for the message.

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
            f"output_dir = {config.output_dir}: its checkpoint {name} was made with another "
            f"{listed}; a resumed run cannot change that: set it back, or choose a new output_dir",
            key=forbidden[0],
        )
    phases = _phases_now(TrainState.from_dict(description["train_state"]), config, name)
    for key in changed:
        logger.info("config change on resume: %s: %r -> %r", key, saved.get(key), now.get(key))
    return phases


def _phases_now(state: TrainState, config: RunConfig, name: str) -> list[dict[str, Any]]:
    """Returns the data phases of a resumed run; raises InputError where its data has changed."""
    if not state.data_phases:
        raise InputError(
            f"output_dir = {config.output_dir}: its checkpoint {name} was made by an earlier "
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
