from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from megadlcm.config import RunConfig
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from megadlcm.training.metrics import MetricsWriter
from tests.support.tiny_runs import tiny_run

MakeRun = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def count_event_files_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenth of a process and a second would be read before the ninth: as text, 10 < 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


GROUPS = {"embedding", "token", "concept", "boundary", "gain", "head"}
# what the program promises for a training row
STEP_KEYS = {
    "step",
    "consumed_samples",
    "consumed_tokens",
    "loss",
    "ratio_loss",
    "tokens_per_concept",
    "tokens_per_concept_threshold",
    "boundary_fraction",
    "mean_boundary_prob",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "model_flops_utilization",
    "step_seconds",
    "data_seconds",
    "batch_digest",
    "world_size",
    "restart_count",
}
CONCEPT_KEYS = {
    "ratio_loss",
    "tokens_per_concept",
    "tokens_per_concept_threshold",
    "boundary_fraction",
    "mean_boundary_prob",
}
EVAL_KEYS = {"step", "eval_loss", "bits_per_byte", "tokens_per_concept", "restart_count"}
SCALARS = {
    "train/loss",
    "train/ratio_loss",
    "concepts/boundary_fraction",
    "concepts/mean_boundary_prob",
    "concepts/tokens_per_concept",
    "concepts/tokens_per_concept_threshold",
    "grad_norm/total",
    *(f"grad_norm/{group}" for group in GROUPS),
    *(f"learning_rate/{group}" for group in GROUPS - {"boundary"}),
    "detector/step_size",
    "throughput/tokens_per_second",
    "throughput/model_flops_utilization",
    "time/step_seconds",
    "time/data_seconds",
    "memory/peak_bytes",
    "eval/loss",
    "eval/bits_per_byte",
    "eval/tokens_per_concept",
    *(f"eval/{name}/{domain}" for name in ("loss", "bits_per_byte") for domain in ("en", "code")),
    *(f"eval/tokens_per_concept/{domain}" for domain in ("en", "code")),
    "eval_loss_by_position/00",
    "eval_loss_by_position/03",
}


def train_row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm_by_group": {"token": loss}}


def events_of(output_dir: Path) -> Any:
    """What TensorBoard shows of a run."""
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    events = EventAccumulator(str(output_dir / "tensorboard"), size_guidance=everything)
    events.Reload()
    return events


def curve(output_dir: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(output_dir).Scalars(tag)]


def write_rows(output_dir: Path, written: list[dict[str, Any]], first_step: int = 1) -> None:
    with contextlib.closing(MetricsWriter(output_dir, first_step, tensorboard=True)) as metrics:
        for row in written:
            metrics.write(row)


def test_a_restart_appends_and_replayed_steps_appear_once(tmp_path: Path) -> None:
    write_rows(tmp_path, [train_row(1), train_row(2), {"step": 2, "eval_loss": 2.0}, train_row(3)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    replayed = [train_row(2), {"step": 2, "eval_loss": 2.0}, train_row(3), train_row(4)]
    write_rows(tmp_path, replayed, first_step=2)
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert [(row["step"], "eval_loss" in row) for row in read_rows(tmp_path)] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
    ]


def test_the_curve_has_no_double_points_across_a_restart(tmp_path: Path) -> None:
    """A start from step 2 takes back what an earlier one showed from there on."""
    write_rows(tmp_path, [train_row(step, 1.0) for step in range(1, 6)])
    write_rows(tmp_path, [train_row(step, 2.0) for step in range(3, 8)], first_step=3)
    expected = [(1, 1.0), (2, 1.0), *((step, 2.0) for step in range(3, 8))]
    assert curve(tmp_path) == curve(tmp_path, "grad_norm/token") == expected


def test_without_a_purge_the_curve_would_have_double_points(tmp_path: Path) -> None:
    """Negative control: the reader above does not remove them by itself."""
    write_rows(tmp_path, [train_row(step, 1.0) for step in range(1, 6)])
    write_rows(tmp_path, [train_row(step, 2.0) for step in range(3, 8)], first_step=100)
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with contextlib.closing(MetricsWriter(tmp_path, 1, tensorboard=False)) as metrics:
        metrics.write(train_row(1))
        assert len(read_rows(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture(scope="module")
def run_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that was started again and trained to step eight."""
    folder = tmp_path_factory.mktemp("metrics")
    sections: dict[str, Any] = {"evaluation": {"interval_steps": 3, "num_sample_texts": 2}}
    for train_steps in (5, 8):
        training = {"train_steps": train_steps, "global_batch_size": 4, "micro_batch_size": 2}
        assert pretrain.run(tiny_run(corpus, folder, training=training, **sections)) == 0
    return folder


def test_rows_have_every_promised_key(run_folder: Path) -> None:
    rows = read_rows(run_folder)
    train = [row for row in rows if "loss" in row]
    evaluation = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert [row["step"] for row in evaluation] == [3, 5, 6, 8]
    for row in train:
        assert row.keys() >= STEP_KEYS
        assert row["grad_norm_by_group"].keys() == GROUPS
        assert row["learning_rate"].keys() == GROUPS - {"boundary"}
        assert min(row["learning_rate"].values()) > 0.0
        assert max(row["learning_rate"].values()) <= 1e-3
        assert len(bytes.fromhex(row["batch_digest"])) >= 16
        assert row["consumed_samples"] == 4 * row["step"]
        ratio = row["tokens_per_concept"]
        assert ratio * row["boundary_fraction"] == pytest.approx(1.0) and ratio > 1.0
        norms = row["grad_norm_by_group"].values()
        assert row["grad_norm"] == pytest.approx(math.hypot(*norms))
    # 0 where F meets its target; far from any learning rate else
    sizes = [row["boundary_step_size"] for row in train]
    assert min(sizes) >= 0.0 and sorted(sizes)[1] > 1.0
    for row in evaluation:
        assert row.keys() >= EVAL_KEYS and row["tokens_per_concept"].keys() == {"en", "code"}
    assert [row["restart_count"] for row in train] == [0] * 5 + [1] * 3
    assert len({row["batch_digest"] for row in train}) == 8
    consumed = [row["consumed_tokens"] for row in train]
    assert consumed == sorted(consumed) and consumed[0] > 0


def test_no_row_holds_what_json_does_not_know(run_folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (run_folder / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=refuse)
    with pytest.raises(AssertionError, match="NaN"):
        json.loads('{"loss": NaN}', parse_constant=refuse)


def test_tensorboard_has_every_curve_once(run_folder: Path) -> None:
    events = events_of(run_folder)
    assert set(events.Tags()["scalars"]) >= SCALARS
    for tag in SCALARS:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == ([3, 5, 6, 8] if tag.startswith("eval") else list(range(1, 9))), tag


def test_tensorboard_shows_the_numbers_of_the_rows(run_folder: Path) -> None:
    rows = read_rows(run_folder)
    for tag, read in (
        ("train/loss", lambda row: row.get("loss")),
        ("grad_norm/concept", lambda row: row.get("grad_norm_by_group", {}).get("concept")),
        ("learning_rate/concept", lambda row: row.get("learning_rate", {}).get("concept")),
        ("detector/step_size", lambda row: row.get("boundary_step_size")),
        ("eval/bits_per_byte/en", lambda row: row.get("bits_per_byte_by_domain", {}).get("en")),
    ):
        expected = [value for value in map(read, rows) if value is not None]
        assert [value for _, value in curve(run_folder, tag)] == pytest.approx(expected, rel=1e-6)


def test_tensorboard_has_concept_lengths_and_sample_texts(run_folder: Path) -> None:
    events = events_of(run_folder)
    lengths = events.Histograms("concepts/length")
    assert [event.step for event in lengths] == list(range(1, 9))
    histogram, row = lengths[0].histogram_value, read_rows(run_folder)[0]
    num_concepts = row["consumed_tokens"] * row["boundary_fraction"]
    assert histogram.num == sum(histogram.bucket) == pytest.approx(num_concepts)
    assert 1.0 <= histogram.min < histogram.sum / histogram.num < histogram.max
    assert histogram.sum <= row["consumed_tokens"]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [3, 5, 6, 8]
    shown = texts[-1].tensor_proto.string_val[0].decode()
    assert "tokens per concept" in shown and "\u2502" in shown


@pytest.mark.parametrize(
    "options",
    [{"optimizer": {"boundary_gain": 0.0}}, {"model": {"boundary_mode": "ema_ste"}}],
    ids=["boundary_gain=0", "ema_ste"],
)
def test_a_detector_that_is_not_steered_has_a_learning_rate(
    make_run: MakeRun, options: dict[str, Any]
) -> None:
    config = make_run(training={"train_steps": 2}, **options)
    assert pretrain.run(config) == 0
    folder = Path(config.output_dir)
    for row in (row for row in read_rows(folder) if "loss" in row):
        assert row["learning_rate"].keys() == row["grad_norm_by_group"].keys() == GROUPS
        assert "boundary_step_size" not in row
    tags = set(events_of(folder).Tags()["scalars"])
    assert "learning_rate/boundary" in tags and "detector/step_size" not in tags


def test_the_dense_control_has_no_rows_about_concepts(make_run: MakeRun) -> None:
    config = make_run(model={"architecture": "dense"}, training={"train_steps": 2})
    assert pretrain.run(config) == 0
    folder = Path(config.output_dir)
    row = read_rows(folder)[0]
    assert row.keys() >= STEP_KEYS - CONCEPT_KEYS and not row.keys() & CONCEPT_KEYS
    events = events_of(folder)
    assert "train/loss" in events.Tags()["scalars"] and events.Tags()["histograms"] == []
