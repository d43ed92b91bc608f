"""`megadlcm checkpoint ...` on a real run, whole, damaged and converted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import InputError
from megadlcm.commands.main import main
from megadlcm.training.checkpoint import load_model
from tests.support.checkpoints import load_tensors, newest_folder
from tests.support.damage import flip_bit
from tests.support.train_processes import write_run_file

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


def test_a_real_run_is_listed_verified_and_inspected(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "list", str(finished)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["6", "4", "2"]
    assert all("tp1 pp1 dp1 zero1" in line and "complete" in line for line in lines)
    assert ["newest" in line for line in lines] == [True, False, False]
    assert main(["checkpoint", "verify", str(finished)]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["ok"] * 3
    assert main(["checkpoint", "inspect", str(finished)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{newest_folder(finished)}\n")
    for part in ("step=6, consumed_samples=24", "world_size=1, zero_stage=1", "torch="):
        assert part in text
    tensors = load_model(finished).state_dict()
    _, _, rows = text.partition("\ntensor ")
    shown = {line.split()[0] for line in rows.splitlines()[1:-1]}
    assert shown == set(tensors)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert f"{len(tensors)} tensors, {values:,} values" in text


def test_a_damaged_block_of_a_real_run_is_named(
    run_folder: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    checkpoint = run_folder / "checkpoints" / "step_0000000004"
    flip_bit(checkpoint / "rank_00000.safetensors")
    assert main(["checkpoint", "verify", str(run_folder)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "DAMAGED", "ok"]
    assert str(checkpoint) in lines[1] and "rank_00000.safetensors: block 0" in lines[1]
    assert f"{run_folder / 'checkpoints'}: 1 of 3 checkpoints damaged" in printed.err
    with pytest.raises(InputError, match=r"rank_00000.safetensors: block 0 .*; name another one"):
        load_model(checkpoint)


@pytest.mark.parametrize("options", [["--files", "3"], ["--consolidated", "--optimizer"]])
def test_a_run_goes_on_from_a_converted_checkpoint(
    run_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    """As from its own: every value is the same bit for bit, two steps later too."""
    six = run_folder / "checkpoints" / "step_0000000006"
    expected = load_tensors(six)
    shutil.rmtree(six)
    four = run_folder / "checkpoints" / "step_0000000004"
    four.rename(tmp_path / "kept")
    assert main(["checkpoint", "convert", str(tmp_path / "kept"), str(four), *options]) == 0
    file = run_folder / "config.yaml"
    assert main(["train", str(file), f"output_dir={run_folder}"]) == 0
    log = (run_folder / "logs" / "rank_0000.log").read_text()
    assert "resumed from " in log and "step_0000000004 (step 4" in log
    model, optimizer, description = load_tensors(six)
    for found, wanted in ((model, expected[0]), (optimizer, expected[1])):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert description["train_state"]["restart_count"] == 1


def test_the_model_of_a_consolidated_checkpoint(finished: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert main(["checkpoint", "convert", str(finished), str(whole), "--consolidated"]) == 0
    expected = load_model(finished).state_dict()
    for tensors in (load_model(whole).state_dict(), load_file(whole / "model.safetensors")):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_a_folder_that_is_no_run_is_one_line(
    corpus: Path, refused: Refused, tmp_path: Path
) -> None:
    for command in ("list", "verify"):
        line = refused("checkpoint", command, corpus)
        assert f"{corpus} has no folder 'checkpoints'" in line and "output_dir of a run" in line
    assert "manifest.json is missing" in refused("checkpoint", "inspect", corpus)
    assert "is not a folder" in refused("checkpoint", "inspect", tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint" in refused("checkpoint", "verify", tmp_path)
    assert "holds no complete checkpoint" in refused("checkpoint", "inspect", tmp_path)


def test_a_start_that_can_load_none_of_its_checkpoints_does_not_begin_anew(
    run_folder: Path, refused: Refused
) -> None:
    for step in (2, 4, 6):
        flip_bit(run_folder / "checkpoints" / f"step_{step:010d}" / "rank_00000.safetensors")
    before = (run_folder / "metrics.jsonl").read_bytes()
    line = refused("train", run_folder / "config.yaml", f"output_dir={run_folder}")
    assert "it has checkpoints, and none can be loaded (step_0000000006: rank 0: rank_" in line
    assert f"remove {run_folder}/checkpoints to start from scratch" in line
    assert (run_folder / "metrics.jsonl").read_bytes() == before
