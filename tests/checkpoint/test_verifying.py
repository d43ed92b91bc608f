"""Every block that is not as it was written is named, by whoever verifies and by whoever reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from megadlcm.checkpoint.folder import Checkpoint, candidates, open_checkpoint
from megadlcm.checkpoint.format import BLOCK_BYTES, MASTER
from megadlcm.checkpoint.index import Range
from megadlcm.checkpoint.reading import BlockReader, jobs_for
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.checkpoint.verifying import verify
from tests.support.damage import flip_bit
from tests.support.hooked_storage import HookedStorage
from tests.support.made_checkpoints import KEYS, make_checkpoint, values_of

# two files of three blocks each
SHAPES = {"matrix": (1200, 1000), "head": (400, 1000), "bias": (78,)}
RANK_FILES = ["rank_00000.safetensors", "rank_00001.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 and 2."""
    root = tmp_path_factory.mktemp("made")
    for step in (1, 2):
        make_checkpoint(root, step, SHAPES, num_buffers=0)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy, to be damaged."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(made, copy)
    yield copy
    shutil.rmtree(copy)


def read_all(checkpoint: Checkpoint) -> None:
    """Reads every tensor, as a load does, and compares it with what was written."""
    import numpy as np

    reader = BlockReader(checkpoint.storage, checkpoint.name, checkpoint.manifest.files)
    for number, (name, shape) in enumerate(checkpoint.index.shapes.items()):
        part = Range.whole(name, shape)
        for key in (MASTER, *KEYS) if number < checkpoint.index.num_parameters else (MASTER,):
            target = np.empty(len(part), np.float32)
            reader.run(jobs_for(checkpoint, part, key, target))
            expected = values_of(checkpoint.step, name, key, 0, len(part))
            assert (target.view(np.uint32) == expected.view(np.uint32)).all()


def first_that_reads(root: Path) -> tuple[int, list[str]]:
    """The step that a start takes, and why it passes over others."""
    said: list[str] = []
    for _, each in candidates(LocalStorage(root)):
        try:
            if isinstance(each, InputError):
                raise each
            read_all(each)
            return each.step, said
        except InputError as error:
            said.append(str(error))
    raise AssertionError(said)


def test_whole_checkpoints_are_whole(made: Path) -> None:
    storage = LocalStorage(made)
    for name in storage.names():
        manifest = open_checkpoint(storage, name).manifest
        assert [manifest.files[file].num_blocks for file in RANK_FILES] == [3, 3]
        seen: list[int] = []
        verdict = verify(storage, name, watch=seen.append)
        assert not verdict.problem and verdict.num_bytes == sum(seen) == manifest.num_bytes
        assert not verify(storage, name, quick=True).problem
    assert first_that_reads(made) == (2, [])


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("file", RANK_FILES)
@pytest.mark.parametrize("place", [0, 1])
def test_a_flipped_bit_of_any_block(root: Path, file: str, block: int, place: int) -> None:
    """The first bit of it, or the last."""
    path = root / "step_0000000002" / file
    size = path.stat().st_size
    end = min((block + 1) * BLOCK_BYTES, size)
    flip_bit(path, block * BLOCK_BYTES if place == 0 else end - 1)
    named = f"{file}: block {block} "
    verdict = verify(LocalStorage(root), "step_0000000002")
    assert verdict.problem.startswith(named) and ";" not in verdict.problem
    assert not verify(LocalStorage(root), "step_0000000001").problem
    if block or place:  # the header is not read: it follows from the index
        step, (line,) = first_that_reads(root)
        assert step == 1 and line.startswith(named)


def swap(folder: Path) -> None:
    kept = (folder / RANK_FILES[0]).read_bytes()
    other = (folder / RANK_FILES[1]).read_bytes()
    assert len(kept) == len(other)
    (folder / RANK_FILES[0]).write_bytes(other)
    (folder / RANK_FILES[1]).write_bytes(kept)


def of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "step_0000000001" / RANK_FILES[0], folder)


def holes(folder: Path) -> None:
    """What a file system may leave after a crash: the size, and nothing in it."""
    size = (folder / RANK_FILES[0]).stat().st_size
    os.truncate(folder / RANK_FILES[0], BLOCK_BYTES)
    os.truncate(folder / RANK_FILES[0], size)


def unreadable(folder: Path) -> None:
    (folder / RANK_FILES[0]).unlink()
    (folder / RANK_FILES[0]).symlink_to("/proc/self/mem")


DAMAGE: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "swapped": (swap, False, "rank_0000"),
    "of another step": (of_another_step, False, RANK_FILES[0]),
    "holes": (holes, False, f"{RANK_FILES[0]}: block 1 "),
    "short by one": (
        lambda folder: os.truncate(
            folder / RANK_FILES[1], (folder / RANK_FILES[1]).stat().st_size - 1
        ),
        True,
        RANK_FILES[1],
    ),
    "missing": (lambda folder: (folder / RANK_FILES[1]).unlink(), True, RANK_FILES[1]),
    "unreadable": (unreadable, True, RANK_FILES[0]),
}


@pytest.mark.parametrize(("damage", "is_quick", "named"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_and_the_older_one_is_taken(
    root: Path, damage: Callable[[Path], None], is_quick: bool, named: str
) -> None:
    folder = root / "step_0000000002"
    damage(folder)
    storage = LocalStorage(root)
    assert bool(verify(storage, folder.name, quick=True).problem) == is_quick
    assert named in verify(storage, folder.name).problem
    step, (line,) = first_that_reads(root)
    assert step == 1 and named in line


def test_every_damaged_block_counts_and_a_few_are_listed(root: Path) -> None:
    for file in RANK_FILES:
        for block in range(3):
            flip_bit(root / "step_0000000002" / file, block * BLOCK_BYTES)
    problem = verify(LocalStorage(root), "step_0000000002").problem
    assert problem.count("block") == 3 and problem.endswith(" and 3 more")


def test_a_block_that_the_disk_does_not_give_is_named(root: Path) -> None:
    def fail(what: str, file: str) -> None:
        if (what, file) == ("read", RANK_FILES[1]):
            raise OSError(5, "Input/output error")

    problem = verify(HookedStorage(root, fail), "step_0000000002", threads=1).problem
    assert problem.startswith(f"{RANK_FILES[1]}: block 0 cannot be read (Input/output error)")


@pytest.mark.parametrize("moment", ["manifest", "read"])
@pytest.mark.parametrize("quick", [True, False])
def test_a_checkpoint_that_is_removed_meanwhile_is_gone_and_not_damaged(
    root: Path, moment: str, quick: bool
) -> None:
    class Removed(LocalStorage):
        def remove_once(self, name: str) -> None:
            if (self.root / name).exists():
                self.remove(name, "0" * 32)

        def manifest(self, name: str) -> bytes:
            if moment == "manifest":
                self.remove_once(name)
            return super().manifest(name)

        def size(self, name: str, file: str) -> int:
            if file == RANK_FILES[1]:
                self.remove_once(name)
            return super().size(name, file)

    verdict = verify(Removed(root), "step_0000000002", quick=quick)
    assert verdict.is_gone and not verdict.problem


def test_a_checkpoint_that_is_saved_again_meanwhile_is_looked_at_again(root: Path) -> None:
    reads = 0

    def replace(what: str, file: str) -> None:
        nonlocal reads
        reads += what == "read" and file == RANK_FILES[0]
        if reads == 1:
            reads += 1
            make_checkpoint(root, 2, SHAPES, written="later")
            flip_bit(root / "step_0000000001" / RANK_FILES[0])
            shutil.copy(root / "step_0000000001" / RANK_FILES[1], root / "step_0000000002")
            make_checkpoint(root, 2, SHAPES | {"bias": (80,)})

    assert not verify(HookedStorage(root, replace), "step_0000000002", threads=1).problem
    assert reads > 2


def test_a_folder_of_any_name_can_be_verified(root: Path) -> None:
    (root / "step_0000000002").rename(root / "best")
    assert not verify(LocalStorage(root), "best").problem
    (root / "best" / "manifest.json").unlink()
    verdict = verify(LocalStorage(root), "best")
    assert verdict.problem == "manifest.json is missing" and not verdict.is_gone
