"""A run that goes on from an earlier checkpoint on another branch: rows and curve are of that one.

The rows of the branch that was left are set aside; those of a mere repetition stay where they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

from megadlcm.config import RunConfig
from megadlcm.engine.learning_rate import apply_learning_rates
from megadlcm.run_folder.rows import evaluation_rows, read_rows, training_rows
from megadlcm.training import pretrain
from tests.support.tiny_runs import tiny_run

MakeRun = Callable[..., RunConfig]
SECTIONS: dict[str, Any] = {"evaluation": {"interval_steps": 2}}


@pytest.fixture(scope="module")
def eight_steps(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of eight steps."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    assert pretrain.run(tiny_run(corpus, folder, **SECTIONS)) == 0
    return folder


@pytest.fixture
def rolled_back(eight_steps: Path, tmp_path: Path) -> Path:
    """A copy of it whose newest checkpoint is that of step 4."""
    folder = tmp_path / "run"
    shutil.copytree(eight_steps, folder)
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:010d}")
    return folder


def curve(folder: Path, tag: str) -> list[tuple[Any, Any]]:
    """What TensorBoard shows of a run."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def assert_rows_are_of_the_branch(folder: Path, earlier: list[dict[str, Any]]) -> None:
    """From step 5 on they are of this branch, and the curve is; the earlier ones are aside."""
    rows = read_rows(folder)
    assert rows[:6] == earlier[:6] and len(rows) == len(earlier) == 12
    assert [row["step"] for row in training_rows(rows)] == list(range(1, 9))
    assert [row["step"] for row in evaluation_rows(rows)] == [2, 4, 6, 8]
    assert {row["restart_count"] for row in rows[6:]} == {1}
    for old, new in zip(evaluation_rows(earlier)[2:], evaluation_rows(rows)[2:], strict=True):
        assert old["eval_loss"] != new["eval_loss"]
    aside = read_rows(folder / "metrics.abandoned.jsonl")
    assert len({row.pop("set_aside") for row in aside}) == 1
    assert aside == earlier[6:] and {row["restart_count"] for row in aside} == {0}
    (event,) = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    assert (event["first_step"], event["last_step"], event["rows"]) == (5, 8, 6)
    for tag, key, shown in (
        ("train/loss", "loss", training_rows(rows)),
        ("eval/loss", "eval_loss", evaluation_rows(rows)),
    ):
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in shown]
        assert curve(folder, tag) == expected


def test_another_learning_rate(eight_steps: Path, rolled_back: Path, corpus: Path) -> None:
    earlier = read_rows(eight_steps)
    config = tiny_run(corpus, rolled_back, **SECTIONS, optimizer={"learning_rate": 1e-2})
    assert pretrain.run(config) == 0
    assert_rows_are_of_the_branch(rolled_back, earlier)
    rates = [row["learning_rate"]["token"] for row in training_rows(read_rows(rolled_back))]
    assert rates[4:] == [pytest.approx(10 * rate) for rate in rates[:4][-1:] * 4]


def test_another_data_phase(eight_steps: Path, rolled_back: Path, corpus: Path) -> None:
    earlier = read_rows(eight_steps)
    sources = [
        {"path": str(corpus / "train"), "name": "train", "weight": 1},
        {"path": str(corpus / "short"), "name": "short", "weight": 3},
    ]
    data = {"train": sources, "new_phase": True}
    assert pretrain.run(tiny_run(corpus, rolled_back, **SECTIONS, data=data)) == 0
    assert_rows_are_of_the_branch(rolled_back, earlier)
    old, new = (training_rows(rows) for rows in (earlier, read_rows(rolled_back)))
    digests = [[row["batch_digest"] for row in rows] for rows in (old, new)]
    assert digests[0][:4] == digests[1][:4] and not {*digests[0][4:]} & {*digests[1][4:]}


def test_other_code(
    eight_steps: Path, rolled_back: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key of the config tells of it: what is compared is what comes out."""
    monkeypatch.setattr(
        "megadlcm.training.trainer.apply_learning_rates",
        lambda optimizer, factor: apply_learning_rates(optimizer, factor * 1.5),
    )
    assert pretrain.run(tiny_run(corpus, rolled_back, **SECTIONS)) == 0
    assert_rows_are_of_the_branch(rolled_back, read_rows(eight_steps))


def test_a_mere_repetition_changes_no_byte(rolled_back: Path, corpus: Path) -> None:
    before = (rolled_back / "metrics.jsonl").read_bytes()
    assert pretrain.run(tiny_run(corpus, rolled_back, **SECTIONS)) == 0
    assert (rolled_back / "metrics.jsonl").read_bytes() == before
    assert not (rolled_back / "metrics.abandoned.jsonl").exists()
    assert not (rolled_back / "events.jsonl").exists()


def test_a_repetition_on_other_intervals_of_checkpoints_is_one(
    rolled_back: Path, corpus: Path
) -> None:
    before = (rolled_back / "metrics.jsonl").read_bytes()
    checkpoint = {"interval_steps": 3, "keep": 1}
    assert pretrain.run(tiny_run(corpus, rolled_back, **SECTIONS, checkpoint=checkpoint)) == 0
    assert (rolled_back / "metrics.jsonl").read_bytes() == before


def test_rows_without_a_checkpoint_are_those_of_the_config(
    eight_steps: Path, rolled_back: Path, corpus: Path
) -> None:
    """Killed before its first checkpoint, and started again with another seed."""
    shutil.rmtree(rolled_back / "checkpoints")
    training = {"train_steps": 1}
    assert pretrain.run(tiny_run(corpus, rolled_back, seed=1, training=training)) == 0
    earlier, rows = read_rows(eight_steps), read_rows(rolled_back)
    assert [row["step"] for row in rows] == [1, 1] and rows[0]["loss"] != earlier[0]["loss"]
    aside = read_rows(rolled_back / "metrics.abandoned.jsonl")
    assert [row["step"] for row in aside] == [row["step"] for row in earlier]
