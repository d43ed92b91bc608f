"""What must hold before the first step, so that wrong input costs no step.

The last check is between processes. Each has read config and indexes by itself, and nothing later
would notice: with other shards or another seed on one node, every process trains on sound samples,
and the run is none that anybody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.reading.sources import SourceSummary, open_sources
from megadlcm.config import RunConfig, config_to_dict
from megadlcm.model.language_model import attention_backend
from megadlcm.parallel.environment import choose_device, launch_environment
from megadlcm.parallel.mesh import ParallelMesh

# where things lie may differ from node to node
_OWN_KEYS = ("output_dir", "data.cache_dir", "data.tokenizer")
_SHOWN = 12
"""Characters of a fingerprint that tell two apart."""


def check_training_sources(config: RunConfig) -> SourceSummary:
    """Opens every shard index of the run before anything is built.

    Args:
        config: the run.

    Returns:
        Their tokenizer, and how much there is to train on.

    Raises:
        InputError: no training source, or one that is missing, damaged or unfit for the model.
    """
    if not config.data.train:
        raise InputError(
            "data.train = [] has no source; give at least one, as in "
            '"data.train=[{path: SHARD_FOLDER}]"',
            key="data.train",
        )
    return open_sources(config.data, config.model.vocab_size)


def check_launch(config: RunConfig) -> None:
    """Checks that this process and its launcher can run the config, before it waits for others.

    Args:
        config: the run.

    Raises:
        InputError: a global batch that the processes cannot share, a device that is not there, or
            an attention back-end that cannot run on it.
    """
    launch = launch_environment()
    # each of these raises where it cannot be; what they return is computed again later
    replicas = config.parallel.data_parallel_size(launch.world_size)
    config.training.gradient_accumulation_steps(replicas)
    device = choose_device(launch)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    try:
        attention_backend(config.model, device, dtype)
    except ValueError as error:
        raise InputError(str(error), key="model.attention_backend") from error


def check_agreement(config: RunConfig, fingerprints: Sequence[str], mesh: ParallelMesh) -> None:
    """Compares config and shards of all processes with those of rank 0; collective.

    Args:
        config: the resolved run, as this process has read it.
        fingerprints: ShardIndex.fingerprint of each source, those of data.train first.
        mesh: ranks of the run.

    Raises:
        InputError: on every process, where one differs; the same line everywhere.
    """
    own = _facts(config, fingerprints)
    # one small object from rank 0 instead of all to all: 512 processes compare in two collectives
    first: dict[str, Any] = mesh.broadcast_object(own)
    told = mesh.gather_over_run(_difference(own, first))
    for rank, difference in enumerate(told):
        if difference:
            raise InputError(
                f"rank {rank}: {difference[1]}; start all processes with the same config on the "
                "same shards",
                key=difference[0],
            )


def _facts(config: RunConfig, fingerprints: Sequence[str]) -> dict[str, Any]:
    """Returns every key that all processes must agree on, with its value."""
    facts: dict[str, Any] = {}
    for section, value in config_to_dict(config).items():
        entries = value if isinstance(value, Mapping) else {"": value}
        facts |= {f"{section}.{key}".rstrip("."): entry for key, entry in entries.items()}
    shards = iter(fingerprints)
    for split in ("train", "valid"):
        facts[f"data.{split}"] = [
            f"weight {source.weight:g}, shards {next(shards)[:_SHOWN]}"
            for source in config.data.sources(split)
        ]
    return {key: value for key, value in facts.items() if key not in _OWN_KEYS}


def _difference(own: Mapping[str, Any], first: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key whose value is not that of rank 0, and both values in words."""
    for key in sorted(own.keys() | first.keys()):
        if own.get(key) != first.get(key):
            values = (each.get(key, "absent") for each in (own, first))
            return key, "{} = {!r}, rank 0 has {!r}".format(key, *values)
    return None
