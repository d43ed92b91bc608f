"""`megadlcm checkpoint list | verify | inspect` on a real run, whole and damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megadlcm.commands.main import main
from megadlcm.training.checkpoint import load_model
from tests.support.train_processes import newest_checkpoint, write_run_file

Refused = Callable[..., str]  # function(*words) -> the line that `megadlcm WORDS` says


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of six steps with checkpoints 2, 4 and 6."""
    root = tmp_path_factory.mktemp("finished")
    file = write_run_file(root / "run.yaml", corpus, root / "run")
    assert main(["train", str(file), "training.train_steps=6", "data.valid=[]"]) == 0
    return root / "run"


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damage(checkpoint: Path, file: str = "model.safetensors") -> None:
    """Changes a bit in the last tensor of a checkpoint."""
    contents = bytearray((checkpoint / file).read_bytes())
    contents[-1] ^= 1
    (checkpoint / file).write_bytes(contents)


def test_list_shows_every_checkpoint_newest_first(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "list", str(finished)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "size", "folder"]
    assert [line.split()[0] for line in lines] == ["6", "4", "2"]
    assert ["(latest)" in line for line in lines] == [True, False, False]
    assert all(" MB " in line and "/step_000000000" in line for line in lines)


def test_list_of_a_run_that_saved_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "holds no checkpoint yet" in capsys.readouterr().out


def test_verify_approves_a_whole_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(finished)]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["ok"] * 3
    assert printed.err == ""


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_verify_names_the_damaged_file_in_one_line_and_exits_with_2(
    run_folder: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    checkpoint = run_folder / "checkpoints" / "step_0000000004"
    damage(checkpoint, file)
    assert main(["checkpoint", "verify", str(run_folder)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "DAMAGED", "ok"]
    assert str(checkpoint) in lines[1] and file in lines[1] and "SHA-256" in lines[1]
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert f"{run_folder / 'checkpoints'}: 1 of 3 checkpoints damaged" in printed.err


def test_verify_names_a_checkpoint_whose_file_is_gone(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest_checkpoint(run_folder) / "optimizer.safetensors").unlink()
    assert main(["checkpoint", "verify", str(run_folder)]) == 2
    assert "optimizer.safetensors is missing" in capsys.readouterr().out.splitlines()[0]


def test_inspect_shows_counters_layout_versions_and_every_tensor(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", str(finished)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{newest_checkpoint(finished)}\n")
    for part in ("step=6, consumed_samples=24", "world_size=1, zero_stage=1", "torch="):
        assert part in text
    tensors = load_model(finished).state_dict()
    _, _, rows = text.partition("\ntensor ")
    shown = {line.split()[0] for line in rows.splitlines() if line.endswith("]")}
    assert shown == set(tensors)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert f"{len(tensors)} tensors, {values:,} values" in text


def test_inspect_takes_the_newest_good_one_and_says_what_it_passed_over(
    run_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run_folder / "checkpoints" / "step_0000000006")
    assert main(["checkpoint", "inspect", str(run_folder)]) == 0
    assert "step=4," in capsys.readouterr().out
    assert "passed over damaged checkpoint" in caplog.text and "step_0000000006" in caplog.text


def test_inspect_of_one_checkpoint_shows_that_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", str(finished / "checkpoints/step_0000000002")]) == 0
    assert "step=2," in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_read_is_one_line(run_folder: Path, refused: Refused) -> None:
    newest = newest_checkpoint(run_folder)
    damage(newest)
    line = refused("checkpoint", "inspect", newest)
    assert f"checkpoint {newest}: model.safetensors" in line and "name another" in line
    (newest / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in refused("checkpoint", "inspect", newest)
    for step in (2, 4):
        damage(run_folder / "checkpoints" / f"step_000000000{step}", "state.json")
    line = refused("checkpoint", "inspect", run_folder)
    assert "holds no complete checkpoint" in line and "name a run that saved one" in line
    assert "manifest.json" in line and "state.json" in line


def test_a_folder_that_is_no_run_is_one_line(
    corpus: Path, refused: Refused, tmp_path: Path
) -> None:
    for command in ("list", "verify"):
        line = refused("checkpoint", command, corpus)
        assert f"{corpus} has no folder 'checkpoints'" in line and "output_dir of a run" in line
    assert "was never committed" in refused("checkpoint", "inspect", corpus)
    assert "is not a folder" in refused("checkpoint", "inspect", tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint" in refused("checkpoint", "verify", tmp_path)
    assert "holds no complete checkpoint" in refused("checkpoint", "inspect", tmp_path)
