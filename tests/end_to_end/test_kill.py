"""A run killed at any moment and started again is bit-equal to the run that was left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

from megadlcm.run_folder.rows import read_rows
from tests.support.checkpoints import load_tensors, newest_folder
from tests.support.damage import flip_bit
from tests.support.train_processes import (
    Moment,
    after_step,
    at_start,
    checkpoint_names,
    differences,
    finish,
    kill_at,
    last_step,
    start_command,
    while_saving,
    write_run_file,
)

TRAIN_STEPS = 20
INTERVAL = 3
OFTEN = {"interval_steps": INTERVAL}
# the evaluation between two checkpoints writes rows that a restart must not repeat either
SECTIONS: dict[str, Any] = {"checkpoint": OFTEN, "evaluation": {"interval_steps": 5}}

pytestmark = pytest.mark.slow(20)

MakeRun = Callable[..., tuple[Path, Path]]


def training(**entries: Any) -> dict[str, Any]:
    """A section `training` of TRAIN_STEPS steps with two micro-batches each."""
    return {"train_steps": TRAIN_STEPS, "global_batch_size": 4, "micro_batch_size": 2} | entries


@pytest.fixture
def make_run(corpus: Path, tmp_path: Path) -> MakeRun:
    """Function(name, **sections) -> file and folder of a run."""

    def make(name: str, **sections: Any) -> tuple[Path, Path]:
        folder = tmp_path / name
        values = SECTIONS | {"training": training()} | sections
        return write_run_file(tmp_path / f"{name}.yaml", corpus, folder, **values), folder

    return make


@pytest.fixture(scope="module")
def left_alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a whole run: fp32, ZeRO 1, two micro-batches."""
    root = tmp_path_factory.mktemp("left_alone")
    values = SECTIONS | {"training": training()}
    file = write_run_file(root / "run.yaml", corpus, root / "run", **values)
    finish(start_command("train", file))
    yield root / "run"


def steps_of(rows: list[dict[str, Any]], key: str) -> list[int]:
    """Steps of the rows that have a key, in file order."""
    return [row["step"] for row in rows if key in row]


def curve_steps(run_folder: Path) -> list[int]:
    """Steps of the training loss as TensorBoard shows it."""
    events = event_accumulator.EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def assert_every_step_is_there_once(run_folder: Path) -> None:
    rows = read_rows(run_folder)
    assert steps_of(rows, "loss") == list(range(1, TRAIN_STEPS + 1))
    assert steps_of(rows, "eval_loss") == [5, 10, 15, 20]
    assert curve_steps(run_folder) == list(range(1, TRAIN_STEPS + 1))


def restart_count(run_folder: Path) -> int:
    """Resumes that the last checkpoint looks back on."""
    _, _, description = load_tensors(newest_folder(run_folder))
    return int(description["train_state"]["restart_count"])


def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(
    make_run: MakeRun, left_alone: Path
) -> None:
    file, folder = make_run("killed")
    kill_at(start_command("train", file), while_saving(1), folder)
    assert 2 * INTERVAL <= last_step(folder) < TRAIN_STEPS
    assert "from scratch" not in finish(start_command("train", file))
    assert differences(left_alone, folder) == []
    assert_every_step_is_there_once(folder)
    assert restart_count(folder) == 1 and restart_count(left_alone) == 0
    assert not [name for name in checkpoint_names(folder) if "." in name]


ZERO_0 = {"parallel": {"zero_stage": 0}}
TRACKED_RULE = {"model": {"boundary_mode": "rule"}}
BF16 = {"training": training(precision="bf16", ratio_statistics="previous_step")}
# one micro-batch, so that F comes from the step itself or the last one, not from a first pass
PREVIOUS_STEP = {"training": training(micro_batch_size=4, ratio_statistics="previous_step")}


@pytest.mark.parametrize(
    ("sections", "moments"),
    [
        pytest.param(
            ZERO_0 | PREVIOUS_STEP,
            [at_start, after_step(INTERVAL - 1), while_saving(0), after_step(11)],
            id="fp32-zero0-previous_step",
        ),
        pytest.param(TRACKED_RULE, [after_step(7), while_saving(3)], id="fp32-zero1-rule"),
        pytest.param(BF16, [while_saving(2), after_step(11)], id="bf16-zero1-previous_step"),
    ],
)
def test_a_run_killed_again_and_again_is_bit_equal_to_the_one_left_alone(
    make_run: MakeRun, sections: dict[str, Any], moments: list[Moment]
) -> None:
    alone_file, alone = make_run("alone", **sections)
    undisturbed = start_command("train", alone_file)
    file, folder = make_run("killed", **sections)
    steps_before = 0
    for moment in moments:
        kill_at(start_command("train", file), moment, folder)
        assert steps_before <= last_step(folder) < TRAIN_STEPS  # no row is ever taken back
        steps_before = last_step(folder)
    finish(start_command("train", file))
    finish(undisturbed)
    assert differences(alone, folder) == []
    assert_every_step_is_there_once(folder)
    assert restart_count(folder) >= 1 and restart_count(alone) == 0
    if sections is TRACKED_RULE:
        model, _, _ = load_tensors(newest_folder(folder))
        assert float(model["boundary_detector.threshold"]) != 0.5  # there was something to lose


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    make_run: MakeRun, left_alone: Path
) -> None:
    file, folder = make_run("damaged")
    kill_at(start_command("train", file), after_step(2 * INTERVAL + 1), folder)
    damaged = newest_folder(folder)
    flip_bit(damaged / "rank_00000.safetensors", -5)
    older = damaged.with_name(sorted(checkpoint_names(folder))[-2])
    finish(start_command("train", file))
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert re.search(rf"passed over damaged checkpoint \S*{damaged.name}: rank 0: rank_00000", log)
    assert f"resumed from {older} " in log
    assert differences(left_alone, folder) == []
    assert_every_step_is_there_once(folder)


def test_another_seed_is_another_run(make_run: MakeRun, left_alone: Path) -> None:
    """The comparison above has teeth: rows, parameters and optimizer state all differ."""
    file, folder = make_run("reseeded", seed=1)
    finish(start_command("train", file))
    found = differences(left_alone, folder)
    last = f"step {TRAIN_STEPS}: "
    assert {f"{last}loss", f"{last}batch_digest"} <= set(found)
    assert any(name.startswith("model ") for name in found)
    assert any(name.startswith("optimizer ") for name in found)
