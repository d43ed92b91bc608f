"""A run on damaged shards: it stops, or goes on and says what it left out; all ranks alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import open_samples
from data_pipeline.errors import DamagedDataError
from data_pipeline.shard_format.table import decode_table
from megadlcm.config import RunConfig
from megadlcm.parallel.process_group import join_process_group
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from megadlcm.training.skipped import damaged_shards
from tests.support.distributed import run_distributed

MakeRun = Callable[..., RunConfig]


@pytest.fixture
def damaged(corpus: Path, tmp_path: Path) -> Path:
    """The training shards with a wrong bit in every seventh document."""
    folder = Path(shutil.copytree(corpus / "train", tmp_path / "damaged"))
    (tar,) = folder.glob("*.tar")
    (table,) = folder.glob("*.documents.npy")
    contents = bytearray(tar.read_bytes())
    for offset in decode_table(table.read_bytes()).rows["tokens_offset"][::7]:
        contents[offset] ^= 1
    tar.write_bytes(contents)
    return folder


def run_of(make_run: MakeRun, folder: Path, **data: Any) -> RunConfig:
    """A run on a folder."""
    source = [{"path": str(folder), "name": "train"}]
    return make_run(data={"train": source, "valid": [], **data})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_left_out_is_counted_and_recorded(make_run: MakeRun, damaged: Path) -> None:
    """And only with the policy to skip; a second start goes on counting."""
    with pytest.raises(DamagedDataError, match="data verify"):
        pretrain.run(run_of(make_run, damaged))
    config = run_of(make_run, damaged, on_damage="skip")
    shutil.rmtree(config.output_dir)
    assert pretrain.run(config) == 0
    num_samples = config.total_steps * config.training.global_batch_size
    samples = list(islice(open_samples(config.data), num_samples))
    expected = [place for sample in samples for place in sample.skipped]
    assert len(expected) > 3
    folder = Path(config.output_dir)
    rows = read_lines(folder / "skipped" / "rank_0000.jsonl")
    assert [row["sample"] for row in rows] == [place.sample for place in expected]
    assert [row["num_tokens"] for row in rows] == [place.num_tokens for place in expected]
    assert all(row["step"] == row["sample"] // 4 + 1 and row["reason"] for row in rows)
    last = read_rows(folder)[-1]
    assert last["skipped_tokens"] == sum(place.num_tokens for place in expected)
    assert last["consumed_tokens"] == sum(len(sample.tokens_T) for sample in samples)
    assert not (folder / "skipped" / "shards.jsonl").exists()


def test_a_missing_shard_is_noted_when_the_run_starts(make_run: MakeRun, damaged: Path) -> None:
    """What it holds is left out sample by sample; held-out data has to be whole."""
    (tar,) = damaged.glob("*.tar")
    tar.unlink()
    config = run_of(make_run, damaged, on_damage="skip", max_skipped_tokens=100)
    with pytest.raises(DamagedDataError, match=r"max_skipped_tokens = 100: \d+ tokens .*skipped"):
        pretrain.run(config)
    (noted,) = read_lines(Path(config.output_dir) / "skipped" / "shards.jsonl")
    assert noted["shard"] == 0 and "missing" in noted["problem"]
    held_out = make_run(
        data={"valid": [{"path": str(damaged), "name": "valid"}], "on_damage": "skip"}
    )
    with pytest.raises(DamagedDataError, match="missing"):
        pretrain.run(held_out)


@dataclass(frozen=True)
class Told:
    """What one rank came to."""

    steps: int
    message: str


def train_until_told(config: RunConfig) -> Told:
    """Trains as a run does; where it ends with an error, the error and the steps before it."""
    mesh = join_process_group(config.parallel)
    try:
        damaged_shards(config, mesh)
    except DamagedDataError as error:
        return Told(-1, str(error))
    with pretrain.open_trainer(config, mesh) as trainer:
        try:
            while trainer.state.step < trainer.train_steps:
                trainer.train_one()
        except DamagedDataError as error:
            return Told(trainer.state.step, str(error))
        return Told(trainer.state.step, "")


def decide(configs: list[RunConfig]) -> list[Told]:
    """What one rank comes to in each of several runs."""
    return [train_until_told(config) for config in configs]


def test_all_ranks_decide_the_same(make_run: MakeRun, corpus: Path, damaged: Path) -> None:
    """One replica meets the damage, both stop after the same step with the same line."""
    whole = run_of(make_run, damaged, on_damage="skip")
    samples = list(islice(open_samples(whole.data), 32))
    lost = [sum(place.num_tokens for place in sample.skipped) for sample in samples]
    limits = [0, sum(lost) - 1, sum(lost)]
    runs = [
        run_of(make_run, damaged, on_damage="skip", max_skipped_tokens=limit) for limit in limits
    ]
    runs = [
        RunConfig(**{**vars(run), "output_dir": f"{run.output_dir}{number}"})
        for number, run in enumerate(runs)
    ]
    gone = Path(shutil.copytree(corpus / "train", damaged.with_name("gone")))
    next(gone.glob("*.tar")).unlink()
    runs.append(run_of(make_run, gone))
    left, right = run_distributed(decide, 2, runs)
    assert left == right
    ends = [told.steps for told in left]
    assert ends[2:] == [8, -1] and ends[0] < ends[1] < 8
    for end, limit in zip(ends[:2], limits[:2], strict=True):
        assert sum(lost[: 4 * end]) <= limit < sum(lost[: 4 * end + 4])
    assert "max_skipped_tokens = 0" in left[0].message and left[2].message == ""
    assert "missing" in left[3].message
