from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megadlcm.config import RunConfig, load_config
from megadlcm.run_folder.start import prepare_run_folder

MakeRun = Callable[..., RunConfig]
ROWS = '{"step": 1}\n'


def left_behind(config: RunConfig) -> Path:
    """A run that was killed before its first checkpoint; returns its folder."""
    prepare_run_folder(config, resumed=False)
    folder = Path(config.output_dir)
    (folder / "metrics.jsonl").write_text(ROWS)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_resolved_config_is_kept_and_loads_as_the_same_run(make_run: MakeRun) -> None:
    config = make_run(seed=3, optimizer={"betas": [0.8, 0.9]})
    prepare_run_folder(config, resumed=False)
    assert load_config(Path(config.output_dir) / "config.yaml") == config


def test_the_same_run_from_scratch_keeps_its_rows(make_run: MakeRun) -> None:
    folder = left_behind(make_run())
    prepare_run_folder(make_run(), resumed=False)
    assert (folder / "metrics.jsonl").read_text() == ROWS
    assert names(folder) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"checkpoint": {"keep": 7}}, {"logging": {"peak_tflops": 1.0}}],
    ids=str,
)
def test_what_does_not_bend_the_curve_keeps_the_rows(
    make_run: MakeRun, change: dict[str, dict[str, object]]
) -> None:
    folder = left_behind(make_run())
    changed = make_run(**change)
    prepare_run_folder(changed, resumed=False)
    assert names(folder) == ["config.yaml", "metrics.jsonl"]
    assert load_config(folder / "config.yaml") == changed


def test_rows_of_another_run_are_set_aside_and_never_overwritten(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    folder = left_behind(make_run())
    for seed in (1, 2):
        prepare_run_folder(make_run(seed=seed), resumed=False)
        (folder / "metrics.jsonl").write_text(f"rows of seed {seed}\n")
    assert names(folder) == ["config.yaml", "metrics.jsonl", "metrics.jsonl.1", "metrics.jsonl.2"]
    assert (folder / "metrics.jsonl.1").read_text() == ROWS
    assert (folder / "metrics.jsonl.2").read_text() == "rows of seed 1\n"
    assert "moved metrics to" in caplog.text


def test_rows_beside_an_unreadable_config_are_set_aside(make_run: MakeRun) -> None:
    folder = left_behind(make_run())
    (folder / "config.yaml").write_text("model: [")
    prepare_run_folder(make_run(), resumed=False)
    assert names(folder) == ["config.yaml", "metrics.jsonl.1"]


def test_a_resumed_run_keeps_its_rows_whatever_changed(make_run: MakeRun) -> None:
    """What may change on resume was checked against the checkpoint."""
    folder = left_behind(make_run())
    prepare_run_folder(make_run(optimizer={"learning_rate": 1.0}), resumed=True)
    assert (folder / "metrics.jsonl").read_text() == ROWS
