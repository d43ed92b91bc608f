"""Another share-out, or whole tensors, bit-equal to the source; no more memory for more bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint import converting
from megadlcm.checkpoint.comparing import compare
from megadlcm.checkpoint.converting import convert_to_files, convert_to_whole_tensors, share_out
from megadlcm.checkpoint.folder import Checkpoint, open_checkpoint
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.checkpoint.verifying import verify
from tests.support.damage import flip_bit
from tests.support.made_checkpoints import KEYS, SMALL, make_checkpoint, values_of

Convert = Callable[[Checkpoint, Path], None]


def opened(folder: Path) -> Checkpoint:
    assert not verify(LocalStorage(folder.parent), folder.name).problem
    return open_checkpoint(LocalStorage(folder.parent), folder.name)


def to_files(count: int) -> Convert:
    return lambda source, target: convert_to_files(source, target, count)


def to_whole_tensors(with_optimizer: bool) -> Convert:
    return lambda source, target: convert_to_whole_tensors(source, target, with_optimizer)


ALL_WAYS: dict[str, Convert] = {
    "1": to_files(1),
    "3": to_files(3),
    "7": to_files(7),
    "model": to_whole_tensors(False),
    "all": to_whole_tensors(True),
}


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return opened(make_checkpoint(tmp_path / "run" / "checkpoints", 4))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that end in the middle of tensors."""
    monkeypatch.setattr(converting, "_BATCH_ELEMENTS", 37)


def test_a_share_out_has_each_element_once() -> None:
    for count in (1, 2, 5, 900):
        files = share_out(dict(SMALL), count)
        assert len(files) == count
        sizes = [sum(map(len, ranges)) for ranges in files]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 809
        ends = dict.fromkeys(SMALL, 0)
        for part in (part for ranges in files for part in ranges):
            assert part.start == ends[part.tensor] < part.stop
            ends[part.tensor] = part.stop
        assert ends == {"embedding": 400, "norm": 8, "head": 400, "threshold": 1}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("count", [1, 3, 7])
def test_another_share_out_is_bit_equal(source: Checkpoint, tmp_path: Path, count: int) -> None:
    target = tmp_path / "new" / "step_0000000004"
    convert_to_files(source, target, count)
    new = opened(target)
    assert [name for name in sorted(os.listdir(target)) if name.startswith("rank_")] == [
        f"rank_{number:05d}.safetensors" for number in range(count)
    ]
    assert new.manifest.fingerprints == source.manifest.fingerprints
    assert compare(source, new).is_equal
    assert new.description == source.description
    assert new.manifest.layout == source.manifest.layout and new.manifest.run == "made"
    sizes = [new.manifest.files[name].size for name in new.manifest.rank_files]
    assert max(sizes) - min(sizes) <= 16
    back = tmp_path / "back"
    convert_to_files(new, back, len(source.manifest.rank_files))
    for name in source.manifest.rank_files:
        own = (tmp_path / "run" / "checkpoints" / "step_0000000004" / name).read_bytes()
        assert (back / name).read_bytes() == own
    assert sorted(os.listdir(tmp_path / "new")) == ["step_0000000004"]  # and no `latest`


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_whole_tensors_by_name(source: Checkpoint, tmp_path: Path, with_optimizer: bool) -> None:
    target = tmp_path / "whole"
    convert_to_whole_tensors(source, target, with_optimizer)
    model = load_file(target / "model.safetensors")
    assert {name: value.shape for name, value in model.items()} == SMALL
    for name, value in model.items():
        assert (value.reshape(-1) == values_of(4, name, "master", 0, value.size)).all()
    assert (target / "optimizer.safetensors").exists() == with_optimizer
    if with_optimizer:
        states = load_file(target / "optimizer.safetensors")
        own = [name for name in SMALL if name != "threshold"]
        assert set(states) == {f"{name}.{key}" for name in own for key in KEYS}
        for name in own:
            for key in KEYS:
                value = states[f"{name}.{key}"].reshape(-1)
                assert (value == values_of(4, name, key, 0, value.size)).all()
    new = opened(target)
    assert new.step == 4 and new.description["train_state"] == source.description["train_state"]
    assert new.description["optimizer_step"] == (4 if with_optimizer else None)
    masters = {name: sums[0] for name, sums in source.manifest.fingerprints.items()}
    assert {name: sums[0] for name, sums in new.manifest.fingerprints.items()} == masters
    assert compare(source, new).is_equal == with_optimizer


@pytest.mark.usefixtures("small_batches")
def test_whole_tensors_can_be_shared_out_again(source: Checkpoint, tmp_path: Path) -> None:
    convert_to_whole_tensors(source, tmp_path / "whole", True)
    convert_to_files(opened(tmp_path / "whole"), tmp_path / "shared", 2)
    assert compare(source, opened(tmp_path / "shared")).is_equal


def test_a_copy_of_a_tokenizer_comes_along(source: Checkpoint, tmp_path: Path) -> None:
    from megadlcm.checkpoint.format import FileEntry, Manifest

    folder = tmp_path / "run" / "checkpoints" / "step_0000000004"
    content = b'{"vocabulary": {}}' * 1000
    (folder / "tokenizer.json").write_bytes(content)
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    manifest.files["tokenizer.json"] = FileEntry.of(len(content), [FileEntry.checksum(content)])
    (folder / "manifest.json").write_bytes(manifest.encode())
    for name, way in ALL_WAYS.items():
        way(opened(folder), tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == content
    flip_bit(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json is damaged"):
        convert_to_files(
            open_checkpoint(LocalStorage(folder.parent), folder.name), tmp_path / "b", 1
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS.keys())
def test_a_damaged_source_leaves_nothing(source: Checkpoint, tmp_path: Path, way: Convert) -> None:
    flip_bit(tmp_path / "run" / "checkpoints" / source.name / "rank_00001.safetensors", 4096)
    with pytest.raises(InputError) as failed:
        way(source, tmp_path / "new")
    assert "step_0000000004: rank_00001.safetensors: block 0 " in str(failed.value)
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_a_source_whose_fingerprints_do_not_fit_is_refused(tmp_path: Path) -> None:
    """Its files are as they were written: it was written wrong."""
    folder = make_checkpoint(tmp_path / "run", 4)
    source = opened(folder)
    source.manifest.fingerprints["head"][2] = f"{1:016x}"
    with pytest.raises(InputError, match="exp_avg_sq of tensor head has another fingerprint"):
        convert_to_files(source, tmp_path / "new", 2)
    convert_to_whole_tensors(source, tmp_path / "masters", False)  # it is none of these
    assert sorted(os.listdir(tmp_path)) == ["masters", "run"]


def test_places_that_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").write_text("here")
    for target, said in (
        (tmp_path / "run", "exists, must be a new folder"),
        (tmp_path / "link", "exists, must be a new folder"),
        (tmp_path / "step_0000000005", "its name says step 5, and step_0000000004 holds step 4"),
        (tmp_path / "file" / "new", "cannot be made (File exists); choose another"),
    ):
        for way in ALL_WAYS.values():
            with pytest.raises(InputError) as refused:
                way(source, target)
            assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("way", ALL_WAYS.values(), ids=ALL_WAYS.keys())
def test_a_full_disk_leaves_nothing(
    source: Checkpoint, tmp_path: Path, way: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    exact = os.write

    def full(descriptor: int, content: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device")
        return exact(descriptor, content)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        patch.setattr(os, "write", full)
        way(source, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["run"]


KILLED = """
import os, sys
from pathlib import Path
from megadlcm.checkpoint import converting
from megadlcm.checkpoint.folder import open_checkpoint
from megadlcm.checkpoint.storage import LocalStorage
source, target, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
checkpoint = open_checkpoint(LocalStorage(source.parent), source.name)
acts = 0
for number in range(1000):
    child = os.fork()
    if child == 0:
        def counted(exact):
            def act(*arguments, **options):
                global acts
                if acts >= number:
                    os.kill(os.getpid(), 9)
                acts += 1
                return exact(*arguments, **options)
            return act
        for name in ("fsync", "rename", "write", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        target_now = target / str(number)
        if way == "files":
            converting.convert_to_files(checkpoint, target_now, 2)
        else:
            converting.convert_to_whole_tensors(checkpoint, target_now, True)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number)
assert not {"torch", "deepspeed"} & set(sys.modules)
"""


@pytest.mark.parametrize("way", ["files", "tensors"])
def test_killed_at_any_act_it_leaves_all_or_nothing(
    source: Checkpoint, tmp_path: Path, way: str
) -> None:
    target = tmp_path / "new"
    target.mkdir()
    folder = str(tmp_path / "run" / "checkpoints" / source.name)
    command = [sys.executable, "-c", KILLED, folder, str(target), way]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    last = int(done.stdout)
    assert last > 10
    whole = [name for name in os.listdir(target) if "." not in name]
    # a kill in the last act, which makes the name durable, comes after the folder has it
    assert set(whole) in ({str(last)}, {str(last), str(last - 1)})
    for name in whole:
        assert compare(source, opened(target / name)).is_equal
    litter = [name for name in os.listdir(target) if "." in name]
    assert litter and all(name.endswith(".writing") for name in litter)


def peak_of(convert: Convert, source: Checkpoint, target: Path) -> int:
    tracemalloc.start()
    try:
        convert(source, target)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", ["3", "all"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, way: str) -> None:
    """Twice 96 MB more take no memory: numpy and bytes are all counted."""
    peaks = []
    for factor in (1, 3):
        shapes = {"matrix": (factor * 4000, 1000), "head": (20, 10), "buffer": (3,)}
        folder = make_checkpoint(tmp_path / str(factor), 1, shapes)
        source = open_checkpoint(LocalStorage(folder.parent), folder.name)
        peaks.append(peak_of(ALL_WAYS[way], source, tmp_path / f"new{factor}"))
    assert peaks[0] > 4 * converting._BATCH_ELEMENTS  # something is counted
    assert peaks[1] < 1.05 * peaks[0]
    assert np.prod([3 * 4000, 1000]) * 12 > peaks[1]


def test_progress_is_told_by_bytes(source: Checkpoint, tmp_path: Path) -> None:
    seen: list[int] = []
    convert_to_files(source, tmp_path / "new", 2, seen.append)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sum(seen) == sum(sizes.values()) - sizes["manifest.json"]


def test_a_manifest_of_whole_tensors_says_what_others_read(
    source: Checkpoint, tmp_path: Path
) -> None:
    convert_to_whole_tensors(source, tmp_path / "whole", True)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert all(set(entry) == {"bytes", "sha256"} for entry in manifest["files"].values())
