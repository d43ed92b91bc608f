"""Checkpoints that earlier versions wrote still resume, and to the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadlcm.config import RunConfig
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "run_of_format_0"
"""A tiny run of eight steps: its checkpoint of step 4, and what its rows said of all steps."""


def continued(make_run: Callable[..., RunConfig], **sections: Any) -> list[dict[str, Any]]:
    """The rows of a run that goes on from the golden checkpoint."""
    config = make_run(checkpoint={"interval_steps": 4, "keep": 0}, **sections)
    folder = Path(config.output_dir)
    shutil.copytree(GOLDEN / "checkpoints", folder / "checkpoints")
    assert pretrain.run(config) == 0
    return read_rows(folder)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_checkpoint_of_the_first_format_resumes(
    make_run: Callable[..., RunConfig], tracked: bool
) -> None:
    """Same samples, same losses and norms up to the rounding of another processor.

    That format knew no tracked threshold: what it says of one is compared where there is none.
    """
    expected = [row for row in read_rows(GOLDEN) if row["step"] > 4]
    assert len(expected) == 5 and "eval_loss" in expected[-1]  # four steps and an evaluation
    rows = continued(make_run, model={"track_threshold": tracked})
    if tracked:
        assert rows.pop()["tokens_per_concept"] != expected.pop()["tokens_per_concept"]
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, old in zip(rows, expected, strict=True):
        found = {key: row[key] for key in old}
        assert found == {
            key: value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
            for key, value in old.items()
        }


def test_a_run_of_another_seed_has_other_losses(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Negative control: the comparison above would see a run that started from scratch."""
    config = make_run(seed=1)
    assert pretrain.run(config) == 0
    rows = {row["step"]: row for row in read_rows(tmp_path / "run") if "loss" in row}
    expected = [row for row in read_rows(GOLDEN) if row["step"] > 4 and "loss" in row]
    assert all(abs(rows[row["step"]]["loss"] - row["loss"]) > 1e-4 for row in expected)
