"""Whole runs of a tiny model, in this process, as `megadlcm train` does them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from data_pipeline.shard_format.index import read_index
from megadlcm.config import RunConfig, load_config
from megadlcm.engine.learning_rate import learning_rate_factor
from megadlcm.engine.objective import MicroBatchResult, Objective
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from megadlcm.training.trainer import Trainer
from tests.support.checkpoints import load_tensors, newest_folder
from tests.support.tiny_runs import without_timing

MakeRun = Callable[..., RunConfig]


def training(**entries: Any) -> dict[str, Any]:
    return {"train_steps": 5, "global_batch_size": 4, "micro_batch_size": 2} | entries


def files_of(folder: Path) -> dict[str, str]:
    """Digest of each file of a run folder, apart from its logs."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "logs"
    }


def log_of(config: RunConfig) -> str:
    return (Path(config.output_dir) / "logs" / "rank_0000.log").read_text("utf-8")


def spoil_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the loss of a step NaN, in each of its two micro-batches."""
    exact, calls = Objective.__call__, 0

    def spoiled(*arguments: Any) -> MicroBatchResult:
        nonlocal calls
        calls += 1
        result = exact(*arguments)
        if calls <= 2 * (step - 1):
            return result
        result.stats.sums[0] = math.nan
        return MicroBatchResult(result.loss * math.nan, result.stats)

    patch.setattr(Objective, "__call__", spoiled)


def test_a_run_leaves_the_promised_folder(make_run: MakeRun) -> None:
    config = make_run(
        training=training(train_steps=7),
        checkpoint={"interval_steps": 3, "keep": 2},
        evaluation={"interval_steps": 4, "num_sample_texts": 3},
    )
    assert pretrain.run(config) == 0
    folder = Path(config.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "logs",
        "metrics.jsonl",
        "samples",
        "tensorboard",
    ]
    assert load_config(folder / "config.yaml") == config
    # the last step is saved and evaluated although no interval falls on it
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step_0000000006",
        "step_0000000007",
    ]
    assert (folder / "checkpoints" / "latest").read_text() == "step_0000000007\n"
    assert [row["step"] for row in read_rows(folder) if "eval_loss" in row] == [4, 7]
    assert [row["step"] for row in read_rows(folder) if "loss" in row] == list(range(1, 8))
    samples = sorted((folder / "samples").iterdir())
    assert [path.name for path in samples] == ["step_0000000004.txt", "step_0000000007.txt"]
    text = samples[0].read_text("utf-8")
    assert text.count("tokens per concept ==") == 3 and "== code / valid1" in text
    assert len(list((folder / "tensorboard").glob("events.*"))) == 1
    assert "saved " in log_of(config) and "WARNING" not in log_of(config)
    _, _, description = load_tensors(newest_folder(folder))
    state, last = description["train_state"], read_rows(folder)[-2]
    for key in ("step", "consumed_samples", "consumed_tokens"):
        assert state[key] == last[key] > 0
    assert state["previous_boundary_fraction"] == last["boundary_fraction"]


def test_a_checkpoint_comes_after_the_rows_of_its_step(make_run: MakeRun) -> None:
    """It claims that they are there: a restart does not write them again."""
    config = make_run(training=training(train_steps=2), evaluation={"interval_steps": 1})
    assert pretrain.run(config) == 0
    log = log_of(config)
    places = [
        log.index(text)
        for text in ("step 1/2", "step 1: held-out", "step 2/2", "step 2: held-out", "saved ")
    ]
    assert places == sorted(places)


def test_a_finished_run_started_again_changes_nothing(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(training=training(train_steps=3), logging={"tensorboard": False})
    assert pretrain.run(config) == 0
    before = files_of(Path(config.output_dir))
    capsys.readouterr()
    assert pretrain.run(config) == 0
    assert files_of(Path(config.output_dir)) == before
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_bad_loss_ends_the_run_and_loses_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(training=training(), checkpoint={"interval_steps": 2})
    folder = Path(config.output_dir)
    with monkeypatch.context() as patch:
        spoil_step(patch, 4)
        assert pretrain.run(config) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 4: loss nan") and error.count("\n") == 1
    assert "Samples 12..15" in error and "ERROR" in log_of(config)
    assert [row["step"] for row in read_rows(folder)] == [1, 2, 3]
    assert newest_folder(folder).name == "step_0000000002"
    # what made it bad is gone: the run goes on as if nothing had happened
    assert pretrain.run(config) == 0
    undisturbed = make_run("undisturbed", training=training(), checkpoint={"interval_steps": 2})
    assert pretrain.run(undisturbed) == 0
    rows, expected = (
        list(without_timing(read_rows(Path(run.output_dir)))) for run in (config, undisturbed)
    )
    assert rows == expected and len(rows) == 6


def test_rates_follow_the_schedule(make_run: MakeRun) -> None:
    config = make_run(
        training=training(train_steps=6),
        schedule={"warmup_steps": 3, "decay_fraction": 0.4},
    )
    assert pretrain.run(config) == 0
    rows = [row for row in read_rows(Path(config.output_dir)) if "loss" in row]
    factors = [learning_rate_factor(config.schedule, step, 6) for step in range(6)]
    assert len(set(factors)) > 3
    peak = config.optimizer.learning_rate
    embedding = [row["learning_rate"]["embedding"] for row in rows]
    assert embedding == pytest.approx([peak * factor for factor in factors])


def test_a_run_says_how_often_it_reads_its_data(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch has the tokens of all training sources, a resumed run those of all its steps."""
    for train_steps in (1, 2):
        config = make_run(training=training(train_steps=train_steps))
        epoch = sum(read_index(source.path).num_stream_tokens for source in config.data.train)
        assert pretrain.run(config) == 0
        epochs = train_steps * 4 * 32 / epoch
        assert round(epochs, 2) > 0
        line = f"training data: {epoch:,} tokens an epoch, {epochs:.2f} epochs in the whole run"
        assert line in capsys.readouterr().out


def test_a_token_budget_is_rounded_up_to_whole_steps(make_run: MakeRun) -> None:
    budget = 2 * 4 * 32 + 1
    config = make_run(training=training(train_steps=None, train_tokens=budget))
    assert pretrain.run(config) == 0
    assert read_rows(Path(config.output_dir))[-1]["step"] == 3


def test_rows_are_as_far_apart_as_asked_and_the_last_step_has_one(make_run: MakeRun) -> None:
    config = make_run(training=training(), logging={"interval_steps": 3}, data={"valid": []})
    assert pretrain.run(config) == 0
    folder = Path(config.output_dir)
    assert [row["step"] for row in read_rows(folder)] == [3, 5]
    assert not (folder / "samples").exists()  # without held-out documents


def test_the_detector_is_calibrated_once(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restart that did it again would throw away what was trained."""
    assert pretrain.run(make_run(training=training(train_steps=2))) == 0
    assert "boundary offset set to" in capsys.readouterr().out
    assert pretrain.run(make_run(training=training(train_steps=3))) == 0
    assert "boundary offset set to" not in capsys.readouterr().out


def test_a_crash_is_in_the_log_of_its_rank_and_leaves_no_handler(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(training=training())
    handlers = [list(logging.getLogger(name).handlers) for name in ("megadlcm", "data_pipeline")]

    def crash(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Trainer, "train_one", crash)
    with pytest.raises(RuntimeError, match="the device is gone"):
        pretrain.run(config)
    assert "Traceback" in log_of(config) and "the device is gone" in log_of(config)
    assert handlers == [
        list(logging.getLogger(name).handlers) for name in ("megadlcm", "data_pipeline")
    ]


def test_a_changed_run_is_refused_before_it_trains(make_run: MakeRun) -> None:
    assert pretrain.run(make_run(training=training(train_steps=1))) == 0
    before = files_of(Path(make_run().output_dir))
    with pytest.raises(InputError, match="seed"):
        pretrain.run(make_run(seed=1))
    assert files_of(Path(make_run().output_dir)) == before
    assert "another" in log_of(make_run())
