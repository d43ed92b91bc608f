"""Processes that were started on other data or with other settings do not train together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.reading.sources import open_sources
from megadlcm.config import RunConfig, config_keys
from megadlcm.parallel.process_group import join_process_group
from megadlcm.training import pretrain
from megadlcm.training.checks import _difference, _facts, check_agreement
from tests.support.distributed import run_distributed

MakeRun = Callable[..., RunConfig]


def compare(pairs: list[tuple[RunConfig, RunConfig]]) -> list[str]:
    """What this rank hears of each pair of configs, its own being the one of its number.

    The last pair is trained as a command would, up to its error.
    """
    rank = int(os.environ["RANK"])
    mesh = join_process_group(pairs[0][rank].parallel)
    told: list[str] = []
    for pair in pairs[:-1]:
        config = pair[rank]
        sources = open_sources(config.data, config.model.vocab_size)
        try:
            check_agreement(config, sources.fingerprints, mesh)
            told.append("")
        except InputError as error:
            told.append(str(error))
    try:
        pretrain.run(pairs[-1][rank])
        told.append("")
    except InputError as error:
        told.append(str(error))
    return told


def test_a_process_on_other_shards_or_settings_is_named_by_all(
    make_run: MakeRun, corpus: Path, tmp_path: Path
) -> None:
    """Shards may lie elsewhere on another node, but must be the same."""
    moved = Path(shutil.copytree(corpus / "train", tmp_path / "moved"))
    parallel = {"collective_timeout_seconds": 10.0}  # rank 0 stays a beat for the others' questions
    config = make_run(parallel=parallel)

    def reading(folder: Path) -> RunConfig:
        train = [{"path": str(folder), "name": "train"}]
        data = {"train": train, "cache_dir": str(folder)}
        return make_run(data=data, parallel=parallel)

    other_seed = replace(config, data=replace(config.data, seed=5))
    other_policy = replace(config, data=replace(config.data, on_damage="skip"))
    other_shards = reading(corpus / "short")
    changed = (reading(moved), other_seed, other_policy, other_shards, other_shards)
    left, right = run_distributed(compare, 2, [(config, each) for each in changed])
    assert left == right
    assert left[0] == ""
    assert "rank 1: data.seed = 5, rank 0 has" in left[1]
    assert "rank 1: data.on_damage = 'skip', rank 0 has 'stop'" in left[2]
    assert "rank 1: data.train = ['weight 1, shards " in left[3] and "\n" not in left[3]
    assert left[4] == left[3]
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()


def test_every_key_but_places_is_compared(make_run: MakeRun) -> None:
    """Also keys that a later version adds; what is told to the others is plain data."""
    config = make_run()
    facts = _facts(config, ["a" * 64, "b" * 64])
    own = {"output_dir", "data.cache_dir", "data.tokenizer"}
    assert {key for key in config_keys() if key not in facts and "[" not in key} <= own
    assert not own & facts.keys() and len(facts) > 50
    assert json.loads(json.dumps(facts)) == facts
    held_out = _facts(config, ["a" * 64, "c" * 64])
    differing = _difference(held_out, facts)
    assert differing is not None
    key, text = differing
    assert key == "data.valid"
    assert text.startswith("data.valid = ['weight 1, shards cccccccccccc']")
    assert _difference(facts, facts) is None


def test_a_run_of_one_process_agrees_with_itself(make_run: MakeRun) -> None:
    config = make_run()
    mesh = join_process_group(config.parallel)
    check_agreement(config, ["a" * 64, "b" * 64], mesh)
