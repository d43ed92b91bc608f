"""A start names what is damaged, takes the next older one, and never begins anew silently."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.format import Manifest
from megadlcm.checkpoint.resume import resume
from megadlcm.config import RunConfig
from megadlcm.run_folder import files
from tests.support import gathering
from tests.support.checkpoints import load_tensors, start_again, train
from tests.support.damage import flip_bit
from tests.support.tiny_runs import tiny_engine, tiny_run

RANK_FILE = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def three_steps(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[Path], RunConfig]]:
    """Checkpoints 1 to 3 of a run, and its config for another folder."""
    folder = tmp_path_factory.mktemp("three") / "run"
    train(tiny_run(corpus, folder), 3, save_at=(1, 2, 3))
    return folder / "checkpoints", lambda other: tiny_run(corpus, other)


def swap_values(folder: Path) -> None:
    """Values change places within the file."""
    path = folder / RANK_FILE
    content = path.read_bytes()
    path.write_bytes(content[:4096] + content[-4096:] + content[8192:-4096] + content[4096:8192])


def wrong_fingerprint(folder: Path) -> None:
    """All checksums fit: what was written was not what the tensors held."""
    path = folder / files.MANIFEST
    manifest = Manifest.decode(path.read_bytes())
    name = next(iter(manifest.fingerprints))
    manifest.fingerprints[name][1] = f"{1:016x}"
    path.write_bytes(manifest.encode())


def renumbered(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_0000000002"), folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip_bit(folder / RANK_FILE), f"{RANK_FILE}: block 0"),
    "swapped": (swap_values, f"{RANK_FILE}: block 0"),
    "of another step": (
        lambda folder: shutil.copy(folder.with_name("step_0000000002") / RANK_FILE, folder),
        f"{RANK_FILE}: block 0",
    ),
    "missing": (lambda folder: (folder / RANK_FILE).unlink(), f"{RANK_FILE} is missing"),
    "index": (lambda folder: flip_bit(folder / "index.safetensors"), "index.safetensors: block 0"),
    "state": (lambda folder: (folder / files.STATE).unlink(), "state.json is missing"),
    "manifest": (lambda folder: (folder / files.MANIFEST).write_text("[]"), "manifest.json: "),
    "later format": (
        lambda folder: (folder / files.MANIFEST).write_text('{"format": 3}'),
        "it has format 3",
    ),
    "fingerprint": (wrong_fingerprint, "after loading, fingerprints differ of"),
    "renumbered": (renumbered, "it holds step 2: the folder was renamed"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_any_damage_is_named_and_the_older_one_is_taken(
    three_steps: tuple[Path, Callable[[Path], RunConfig]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    made, config_for = three_steps
    config = config_for(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_0000000003"
    shutil.copytree(made, folder.parent)
    damage(folder)
    expected = load_tensors(folder.with_name("step_0000000002"))
    with caplog.at_level(logging.WARNING):
        engine, state = start_again(config)
    assert state.step == 2
    (line,) = [each.getMessage() for each in caplog.records if "passed over" in each.getMessage()]
    assert "step_0000000003: " in line and said in line
    # nothing of what was half loaded is left
    found = gathering.read_model(engine) | gathering.read_optimizer(engine)
    wanted = expected[0] | expected[1]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_without_any_that_can_be_loaded_nothing_begins_from_scratch(
    three_steps: tuple[Path, Callable[[Path], RunConfig]], tmp_path: Path
) -> None:
    made, config_for = three_steps
    config, copy = config_for(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    shutil.copytree(made, copy)
    flip_bit(copy / "step_0000000001" / RANK_FILE)
    (copy / "step_0000000002" / files.MANIFEST).write_text("{")
    shutil.rmtree(copy / "step_0000000003")
    (copy / "step_0000000003").symlink_to("nowhere")
    with pytest.raises(InputError) as refused:
        resume(tiny_engine(config), config)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(f"output_dir = {config.output_dir}: it has ")
    assert [f"step_000000000{step}: " in line for step in (1, 2, 3)] == [True] * 3


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run()
    engine = tiny_engine(config)

    def fail(_: Path) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("megadlcm.checkpoint.storage.os.listdir", fail)
    with pytest.raises(StorageError, match=r"its checkpoints cannot be listed \(.*Input/output"):
        resume(engine, config)
