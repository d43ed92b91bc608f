"""What checkpoints weigh and how often they are written, against sums by hand."""

from __future__ import annotations

import math

import pytest

from megadlcm.config import load_config
from megadlcm.plan.layout import Hardware
from megadlcm.plan.report import make_plan
from tests.support.paths import ROOT

BYTES = 2_340_000_000 * 12
"""The paper's large model: fp32 masters and two moments."""


def test_the_large_model_on_sixty_four_devices() -> None:
    config = load_config(ROOT / "configs" / "dlcm_2.3b.yaml", ["checkpoint.async=true"])
    hardware = Hardware(8, 8, peak_tflops=989.0, write_gb=2.0, failure_hours=24.0)
    plan = make_plan(config, hardware)
    saves = plan.checkpoints
    assert saves.total_bytes == pytest.approx(BYTES, rel=1e-3)
    mean = saves.total_bytes / 64
    assert saves.process_bytes == pytest.approx(mean * saves.imbalance)
    assert saves.staging_node_bytes == pytest.approx(8 * saves.process_bytes)
    assert saves.save_seconds == pytest.approx(saves.total_bytes / 16e9)
    assert saves.stall_seconds < 0.1 * saves.save_seconds
    # sqrt(2 x stall x time between failures), here more than a save takes
    best = math.sqrt(2 * saves.stall_seconds * 24 * 3600)
    assert saves.interval_seconds == pytest.approx(best)
    assert saves.loss_seconds == pytest.approx(best / 2)
    step = plan.layout.step_seconds
    assert step is not None and saves.interval_steps == math.ceil(best / step)


def test_stages_of_different_size_and_saves_that_training_waits_for() -> None:
    config = load_config(
        ROOT / "configs" / "dlcm_2.3b.yaml",
        ["checkpoint.async=false", "parallel.pipeline_parallel_size=2", "parallel.zero_stage=1"],
    )
    saves = make_plan(config, Hardware(1, 8)).checkpoints
    assert saves.imbalance > 1.0
    assert saves.staging_node_bytes == 0.0
    assert saves.stall_seconds == saves.save_seconds
    assert saves.interval_seconds is None and saves.interval_steps is None


def test_a_run_that_fails_all_the_time_does_not_save_faster_than_it_can() -> None:
    config = load_config(ROOT / "configs" / "dlcm_2.3b.yaml", ["checkpoint.async=true"])
    saves = make_plan(config, Hardware(1, 8, failure_hours=0.001)).checkpoints
    assert saves.interval_seconds == pytest.approx(1.25 * saves.save_seconds)
