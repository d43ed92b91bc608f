"""What may be a checkpoint is one, or is named and passed over; nothing ends with a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, StorageError
from megadlcm.checkpoint.folder import Checkpoint, candidates, find_checkpoint, open_checkpoint
from megadlcm.checkpoint.format import FORMAT, Manifest
from megadlcm.checkpoint.index import Index, Piece, Range
from megadlcm.checkpoint.storage import LocalStorage
from tests.support.damage import flip_bit
from tests.support.hooked_storage import HookedStorage
from tests.support.made_checkpoints import SMALL, make_checkpoint

RANK_FILE = "rank_00000.safetensors"


def good_steps(root: Path) -> list[int]:
    return [each.step for _, each in candidates(LocalStorage(root)) if isinstance(each, Checkpoint)]


def problem_of(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(LocalStorage(folder.parent), folder.name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_are_found_newest_first(tmp_path: Path) -> None:
    assert good_steps(tmp_path / "nothing") == []
    for step in (5, 20, 10):
        make_checkpoint(tmp_path, step)
    assert good_steps(tmp_path) == [20, 10, 5]
    (tmp_path / "latest").write_text("step_0000000099\n")  # for people alone
    assert good_steps(tmp_path) == [20, 10, 5]


def test_a_torn_manifest_is_no_manifest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    path = make_checkpoint(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    assert Manifest.decode(content).encode() == content
    for length in range(len(content) - 1):  # all but the last end of line
        with pytest.raises(InputError):
            Manifest.decode(content[:length])
    path.write_bytes(content[: len(content) // 2])
    assert good_steps(tmp_path) == [1]
    assert problem_of(path.parent).startswith("manifest.json: it is damaged (")


def test_a_changed_manifest_is_no_manifest(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        try:
            assert Manifest.decode(bytes(changed)) == Manifest.decode(content)
        except InputError:
            continue
        assert changed.strip() != content.strip() or content[place] in b"\n ", place


ODD_MANIFESTS = {
    "nothing": b"",
    "null": b"null",
    "list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "binary": bytes(range(256)),
    "lists nothing": json.dumps({"step": 2, "files": {}}).encode(),
    "no files": json.dumps({"step": 2}).encode(),
    "files are a number": json.dumps({"step": 2, "files": 3}).encode(),
    "first format, odd files": json.dumps(
        {"step": 2, "files": {"model.safetensors": 1, "state.json": None}}
    ).encode(),
    "first format, odd step": json.dumps(
        {"step": [], "files": {n: {"bytes": 0} for n in ("model.safetensors", "state.json")}}
    ).encode(),
}


@pytest.mark.parametrize("content", ODD_MANIFESTS.values(), ids=ODD_MANIFESTS.keys())
def test_an_odd_manifest_is_passed_over(tmp_path: Path, content: bytes) -> None:
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2)
    (folder / "manifest.json").write_bytes(content)
    assert "manifest.json" in problem_of(folder)
    assert good_steps(tmp_path) == [1]


def changed_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    path = folder / "manifest.json"
    path.write_bytes(change(Manifest.decode(path.read_bytes())).encode())


def test_a_format_of_a_later_version_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2, format=FORMAT + 1)
    assert f"it has format {FORMAT + 1}, and this version knows" in problem_of(folder)
    # whatever else such a version says
    (folder / "manifest.json").write_text(json.dumps({"format": 9, "shards": []}))
    assert "install a later megadlcm" in problem_of(folder)
    assert good_steps(tmp_path) == [1]


def test_a_renumbered_copy_is_not_taken_for_a_later_step(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    shutil.copytree(folder, tmp_path / "step_0000000009")
    assert good_steps(tmp_path) == [5]
    assert problem_of(tmp_path / "step_0000000009") == "it holds step 5: the folder was renamed"
    # a name that says no step may be any
    shutil.copytree(folder, tmp_path / "best")
    assert find_checkpoint(tmp_path / "best").step == 5


def unlisted(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def other_model(folder: Path) -> None:
    other = make_checkpoint(folder.parent / "other", 2, {"embedding": (50, 9), "threshold": ()})
    shutil.copy(other / "manifest.json", folder)


def files_of_another_step(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder.parent / "step_0000000001" / name, folder)


def swapped(folder: Path) -> None:
    one, other = folder / RANK_FILE, folder / "rank_00001.safetensors"
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)


def unreadable(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/proc/self/mem")  # EIO where it begins

    return change


def as_folder(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


SEEN_AT_ONCE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (unlisted("manifest.json"), "manifest.json is missing"),
    "no index": (unlisted("index.safetensors"), "index.safetensors is missing"),
    "no state": (unlisted("state.json"), "state.json is missing"),
    "no rank file": (unlisted(RANK_FILE), f"{RANK_FILE} is missing"),
    "short": (lambda folder: os.truncate(folder / RANK_FILE, 5000), f"{RANK_FILE} has 5,000 bytes"),
    "long": (
        lambda folder: os.truncate(folder / RANK_FILE, 1 << 20),
        f"{RANK_FILE} has 1,048,576 bytes, the manifest says",
    ),
    "index": (
        lambda folder: flip_bit(folder / "index.safetensors"),
        "index.safetensors: block 0",
    ),
    "index header": (
        lambda folder: flip_bit(folder / "index.safetensors", 0),
        "index.safetensors: block 0",
    ),
    "state": (lambda folder: flip_bit(folder / "state.json"), "state.json: block 0"),
    "other model": (other_model, "the manifest says"),
    "state of another step": (files_of_another_step("state.json"), "state.json"),
    "manifest of another step": (files_of_another_step("manifest.json"), "it holds step 1"),
    "manifest unreadable": (unreadable("manifest.json"), "manifest.json cannot be read"),
    "manifest a folder": (as_folder("manifest.json"), "manifest.json cannot be read"),
    "state unreadable": (unreadable("state.json"), "state.json"),
    "rank file a folder": (as_folder(RANK_FILE), RANK_FILE),
}


@pytest.mark.parametrize(("damage", "said"), SEEN_AT_ONCE.values(), ids=SEEN_AT_ONCE.keys())
def test_damage_that_is_seen_at_once(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    root = tmp_path / "checkpoints"
    make_checkpoint(root, 1)
    folder = make_checkpoint(root, 2)
    assert good_steps(root) == [2, 1]
    damage(folder)
    assert said in problem_of(folder)
    assert good_steps(root) == [1]
    assert find_checkpoint(tmp_path).step == 1


def wrong_index(change: Callable[[Index], Index]) -> Callable[[Path], object]:
    """An index with the right checksum that its writer got wrong."""

    def write(folder: Path) -> None:
        from megadlcm.checkpoint.format import FileEntry

        index = Index.decode((folder / "index.safetensors").read_bytes())
        content = change(index).encode()
        (folder / "index.safetensors").write_bytes(content)
        entry = FileEntry.of(len(content), [FileEntry.checksum(content)])

        def listed(manifest: Manifest) -> Manifest:
            manifest.files["index.safetensors"] = entry
            return manifest

        changed_manifest(folder, listed)

    return write


def test_an_index_that_does_not_fit_its_files_is_damage(tmp_path: Path) -> None:
    piece = Piece((0, 0), (50, 8))
    shorter = Index.of(dict(SMALL), 3, [[Range("embedding", piece, 0, 7)]])
    folder = make_checkpoint(tmp_path, 2)
    wrong_index(lambda _: shorter)(folder)
    assert "index.safetensors does not fit the size of rank_00000" in problem_of(folder)
    norm = Range("norm", Piece((0,), (8,)), 0, 8)
    wrong_index(lambda _: Index.of(dict(SMALL), 3, [[], [], [norm]]))(folder)
    assert "speaks of files that the manifest does not have" in problem_of(folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EISDIR])
@pytest.mark.parametrize("error", [OSError, StorageError])
def test_what_the_storage_does_not_give_is_passed_over(
    tmp_path: Path, number: int, error: type[Exception]
) -> None:
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    names: list[str] = []

    class Failing(LocalStorage):
        def read(self, name: str, file: str, start: int, into: memoryview) -> int:
            if name.endswith("2"):
                raise OSError(number, os.strerror(number)) if error is OSError else error("gone")
            return super().read(name, file, start, into)

    found = dict(candidates(Failing(tmp_path)))
    names += [name for name, each in found.items() if isinstance(each, InputError)]
    assert names == ["step_0000000002"]
    assert isinstance(found["step_0000000001"], Checkpoint)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(path.parent)  # its path may not be long
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("no folder"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": loop,
    "socket": bind_socket,
    "empty folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=IN_THE_WAY.keys())
def test_what_only_bears_the_name_of_a_checkpoint_is_named(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make_checkpoint(tmp_path, 1)
    make(tmp_path / "step_0000000002")
    assert "manifest.json" in problem_of(tmp_path / "step_0000000002")
    assert good_steps(tmp_path) == [1]
    # the step can be saved nevertheless
    make_checkpoint(tmp_path, 2)
    assert good_steps(tmp_path) == [2, 1]


def test_a_link_to_a_checkpoint_is_one(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "elsewhere", 3)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_0000000003").symlink_to("../elsewhere/step_0000000003")
    assert find_checkpoint(tmp_path).step == 3


def test_a_file_of_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    for name in ("step_12", "step_00000000012", "step_0000000009.old", "Step_0000000009", "\n"):
        (tmp_path / name).mkdir()
    assert good_steps(tmp_path) == [1]
    assert [name for name, _ in candidates(LocalStorage(tmp_path))] == ["step_0000000001"]


def test_a_file_that_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a name may be known to one node and not yet to another."""
    make_checkpoint(tmp_path, 1)
    pauses: list[float] = []
    monkeypatch.setattr("megadlcm.checkpoint.storage.time.sleep", pauses.append)
    late = tmp_path / "step_0000000001" / "state.json"
    content = late.read_bytes()

    def look(what: str, file: str) -> None:
        if what == "read" and file == "state.json":
            late.unlink()
            monkeypatch.setattr(
                "megadlcm.checkpoint.storage.os.listdir",
                lambda _: len(pauses) == 2 and late.write_bytes(content),
            )

    assert open_checkpoint(HookedStorage(tmp_path, look), "step_0000000001").step == 1
    assert pauses == [0.1, 0.2, 0.5]


def described(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b"\xff", described(train_state=1)[:-1]])
def test_a_state_that_says_nothing_is_damage(tmp_path: Path, content: bytes) -> None:
    """With the right checksum: a wrong writer, or a hand."""
    from megadlcm.checkpoint.format import FileEntry

    folder = make_checkpoint(tmp_path, 1)
    (folder / "state.json").write_bytes(content)

    def listed(manifest: Manifest) -> Manifest:
        manifest.files["state.json"] = FileEntry.of(len(content), [FileEntry.checksum(content)])
        return manifest

    changed_manifest(folder, listed)
    assert problem_of(folder).startswith("state.json is ")
