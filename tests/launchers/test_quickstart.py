"""`make quickstart` from an empty folder to its report, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import read_index
from megadlcm.training.checkpoint_folder import newest_verified
from tests.tiny_runs import read_rows

ROOT = Path(__file__).parents[2]
STEPS = 3
# the same commands on less text, and hardly any steps
SHORT = ("training.global_batch_size=4", "schedule.warmup_steps=1", "evaluation.max_documents=2")
NUMBER = r"\d[\d,]*\.?\d*"
REPORT = (
    rf"quickstart: {STEPS} steps, {NUMBER} minutes",
    rf"training loss +{NUMBER} -> {NUMBER} nats per token",
    rf"held-out loss +{NUMBER} nats per token",
    rf"held-out bits per byte +{NUMBER}$",
    rf"tokens per concept +{NUMBER} as trained",
    rf"held-out, by domain +code {NUMBER}, en {NUMBER}$",
    rf"tokens per second +{NUMBER}$",
    "sample text, '\u2502' marks concept boundaries",
    r"tensorboard --logdir \S+",
)


def quickstart(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the quickstart to its end."""
    return subprocess.run(
        [sys.executable, "-m", "launchers.quickstart", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_the_quickstart_trains_evaluates_and_reports(tmp_path: Path) -> None:
    options = ("--folder", tmp_path, "--code-bytes", "200000")
    done = quickstart(*options, f"training.train_steps={STEPS}", *SHORT)
    assert done.returncode == 0, done.stderr
    report = done.stdout.partition("== quickstart")
    assert report[1]
    text = "quickstart" + report[2]
    assert [line for line in REPORT if not re.search(line, text, re.MULTILINE)] == []
    assert text.count("\u2502") > 1  # the mark itself, in the sample and not only in its title
    assert re.search(r"^== (en|code) / .*: .* tokens per concept ==$", text, re.MULTILINE)
    events = re.search(r"tensorboard --logdir (\S+)", text)
    assert events and list(Path(events[1]).glob("events.*"))
    commands = re.findall(r"^\$ megadlcm (\w+ ?\w*)", done.stdout, re.MULTILINE)
    assert commands[:5] == ["data tokenizer", *["data prepare"] * 4]
    for split in ("train", "valid"):
        for domain in ("en", "code"):
            assert set(read_index(tmp_path / "data" / f"{domain}_{split}").domains) == {domain}
    run_folder = tmp_path / "run"
    assert [row["step"] for row in read_rows(run_folder) if "loss" in row] == [1, 2, 3]
    newest = newest_verified(run_folder / "checkpoints")
    assert newest is not None and newest.step == STEPS


def test_a_wrong_override_ends_the_quickstart_with_its_line(tmp_path: Path) -> None:
    """The exit code of the failing command is the quickstart's."""
    done = quickstart("--folder", tmp_path, "--code-bytes", "50000", "model.d_tokn=3")
    assert done.returncode == 2
    assert "error: model.d_tokn is not a config key; did you mean model.d_token?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_run_folder_follows_from_folder() -> None:
    done = quickstart("output_dir=elsewhere")
    assert done.returncode == 2
    assert "output_dir" in done.stderr and "--folder" in done.stderr
