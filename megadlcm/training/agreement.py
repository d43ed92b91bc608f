"""Do all processes of a run train the same run? Each has read config and indexes by itself.

Nothing later would notice: with other shards or another seed on one node, every process trains on
sound samples, and the run is none that anybody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig, config_to_dict
from megadlcm.parallel.mesh import ParallelMesh

# where things lie may differ from node to node
_OWN_KEYS = ("output_dir", "data.cache_dir", "data.tokenizer")
_SHOWN = 12
"""Characters of a fingerprint that tell two apart."""


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
    first: dict[str, Any] = mesh.broadcast_object(own)
    told = mesh.gather_over_run(_difference(own, first))
    for rank, difference in enumerate(told):
        if difference:
            raise InputError(
                f"rank {rank}: {difference}; start all processes with the same config on the same "
                "shards"
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


def _difference(own: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Returns the first key whose value is not that of rank 0, or an empty string."""
    for key in sorted(own.keys() | first.keys()):
        if own.get(key) != first.get(key):
            return f"{key} = {own.get(key, 'absent')!r}, rank 0 has {first.get(key, 'absent')!r}"
    return ""
