"""`make quickstart` from an empty folder to its report, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import read_index
from launchers.quickstart.report import print_report
from megadlcm.run_folder.owner import holding
from megadlcm.run_folder.rows import read_rows
from tests.support.checkpoints import problems
from tests.support.paths import ROOT

STEPS = 3
# the same commands on less text, and hardly any steps
SHORT = ("training.global_batch_size=4", "schedule.warmup_steps=1", "evaluation.max_documents=2")
NUMBER = r"\d[\d,]*\.?\d*"
REPORT = (
    rf"quickstart: {STEPS} steps, {NUMBER} minutes",
    rf"training loss +{NUMBER} -> {NUMBER} nats per token",
    rf"held-out loss +{NUMBER} nats per token",
    rf"held-out bits per byte +{NUMBER}$",
    rf"tokens per concept +{NUMBER} in training, as drawn$",
    rf"^ +{NUMBER} at inference, thresholded$",
    rf"held-out, by domain +code {NUMBER}, en {NUMBER}$",
    rf"tokens per second +{NUMBER}$",
    "sample text, '\u2502' marks concept boundaries",
    r"tensorboard --logdir \S+",
)


def quickstart(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the quickstart to its end."""
    return subprocess.run(
        [sys.executable, "-m", "megadlcm", "quickstart", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a quickstart."""
    folder = tmp_path_factory.mktemp("first")
    options = ("--folder", folder, "--code-bytes", "200000")
    done = quickstart(*options, f"training.train_steps={STEPS}", *SHORT)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def shard_digests(folder: Path) -> list[bytes]:
    """Digests of all shards of a quickstart."""
    paths = sorted((folder / "data").glob("*_*/index.json"))
    assert len(paths) == 4
    return [shard.tar_sha256 for path in paths for shard in read_index(path.parent).shards]


@pytest.mark.slow
def test_the_quickstart_trains_evaluates_and_reports(first: tuple[Path, str]) -> None:
    folder, printed = first
    report = printed.partition("== quickstart")
    assert report[1]
    text = "quickstart" + report[2]
    assert [line for line in REPORT if not re.search(line, text, re.MULTILINE)] == []
    assert text.count("\u2502") > 1  # the mark itself, in the sample and not only in its title
    assert re.search(r"^== (en|code) / .*: .* tokens per concept ==$", text, re.MULTILINE)
    events = re.search(r"tensorboard --logdir (\S+)", text)
    assert events and list(Path(events[1]).glob("events.*"))
    commands = re.findall(r"^\$ megadlcm (\w+ ?\w*)", printed, re.MULTILINE)
    assert commands[:5] == ["data tokenizer", *["data prepare"] * 4]
    for split in ("train", "valid"):
        for domain in ("en", "code"):
            assert set(read_index(folder / "data" / f"{domain}_{split}").domains) == {domain}
    assert [row["step"] for row in read_rows(folder / "run") if "loss" in row] == [1, 2, 3]
    found = problems(folder / "run")
    assert max(found) == STEPS and not found[STEPS]


@pytest.mark.slow
def test_a_second_quickstart_makes_its_data_again_and_trains_from_scratch(
    first: tuple[Path, str], tmp_path: Path
) -> None:
    """Whatever has changed in between: here the text and the config."""
    folder = Path(shutil.copytree(first[0], tmp_path / "second"))
    earlier, digests = read_rows(folder / "run"), shard_digests(folder)
    options = ("--folder", folder, "--code-bytes", "50000")
    done = quickstart(*options, "training.train_steps=2", *SHORT)
    assert done.returncode == 0, done.stderr
    assert f"removing the earlier run in {folder / 'run'}" in done.stdout
    assert "quickstart: 2 steps" in done.stdout
    rows = [row for row in read_rows(folder / "run") if "loss" in row]
    assert [(row["step"], row["restart_count"]) for row in rows] == [(1, 0), (2, 0)]
    assert rows[0]["batch_digest"] != earlier[0]["batch_digest"]
    assert not set(shard_digests(folder)) & set(digests)


def test_what_is_no_run_folder_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("chapter one")
    (tmp_path / "linked").mkdir()
    (tmp_path / "other" / "logs").mkdir(parents=True)
    (tmp_path / "linked" / "run").symlink_to(tmp_path / "other")
    for folder in (tmp_path, tmp_path / "linked"):
        done = quickstart("--folder", folder)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {folder / 'run'} is not the folder of a run")
        assert done.stderr.count("\n") == 1 and "--folder" in done.stderr
        assert not (folder / "data").exists()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "chapter one"
    assert (tmp_path / "other" / "logs").is_dir()


def test_a_wrong_override_ends_the_quickstart_before_anything_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    done = quickstart("--folder", tmp_path, "model.d_tokn=3")
    assert done.returncode == 2
    message = "error: model.d_tokn is not a config key; did you mean model.d_token?\n"
    assert done.stderr == message
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "data").exists()


def test_a_failing_command_ends_the_quickstart_with_its_exit_code(tmp_path: Path) -> None:
    options = ("--folder", tmp_path, "--code-bytes", "50000")
    done = quickstart(*options, "data.train=[{path: absent}]")
    assert done.returncode == 2
    assert "error: " in done.stderr and "absent" in done.stderr
    assert "Traceback" not in done.stderr and "== quickstart" not in done.stdout


def test_the_reported_ratio_is_tokens_over_concepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 2 and 6 tokens per concept have 3 together; the mean of the two would be 4."""
    step = {"loss": 1.0, "tokens_per_second": 1.0}
    ratios = [(9.0, 9.0)] * 4 + [(2.0, 4.0), (6.0, 12.0)]
    rows = [
        step | {"step": i, "tokens_per_concept": a, "tokens_per_concept_threshold": b}
        for i, (a, b) in enumerate(ratios, start=1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    print_report(tmp_path, 60.0)
    printed = capsys.readouterr().out
    assert "3.00 in training, as drawn" in printed
    assert "6.00 at inference, thresholded" in printed


def test_the_run_folder_follows_from_folder() -> None:
    done = quickstart("output_dir=elsewhere")
    assert done.returncode == 2
    assert "output_dir" in done.stderr and "--folder" in done.stderr


def test_a_run_that_is_still_training_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with holding(tmp_path / "run"):
        done = quickstart("--folder", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"output_dir = {tmp_path / 'run'}: another start of the run is using it" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()
