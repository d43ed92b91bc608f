"""A folder as a whole, verified by one process or by several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from data_pipeline import read_index
from data_pipeline.config import SourceConfig
from data_pipeline.inspection.verify import Unread, available_cores, verify_folder
from data_pipeline.shard_format.index import Shard
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.open import open_storage

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [30, 5, 1, 20, 9, 44, 40, 41, 42, 43]


def flip(path: Path, offset: int) -> None:
    """Changes one byte of a file."""
    contents = bytearray(path.read_bytes())
    contents[offset] ^= 0x20
    path.write_bytes(contents)


def test_problems_do_not_depend_on_the_number_of_processes(make_numbered: MakeNumbered) -> None:
    """Nor does their order; the processes are real ones."""
    folder = Path(make_numbered(LENGTHS).path)
    index = read_index(folder)
    assert len(index.shards) >= 6
    assert not list(verify_folder(index, workers=2))
    (folder / "shard-000000.tar").unlink()
    flip(folder / "shard-000001.tar", 600)
    flip(folder / "shard-000003.documents.npy", 200)
    flip(folder / "shard-000005.tar", 1030)
    (folder / "shard-000099.tar").write_bytes(b"")
    (folder / "prepared.json").unlink(missing_ok=True)
    alone = list(verify_folder(index))
    names = ["shard-000000", "shard-000001", "shard-000003", "shard-000005", "shard-000099"]
    found = [name for problem in alone for name in names if name in problem]
    assert sorted(set(found)) == names and found == sorted(found)
    assert list(verify_folder(index, workers=3)) == alone


def test_a_lost_shard_is_one_problem(make_numbered: MakeNumbered) -> None:
    """The counts of its domains are missing, which is no news."""
    folder = Path(make_numbered(LENGTHS).path)
    (folder / "shard-000001.documents.npy").unlink()
    (problem,) = verify_folder(read_index(folder))
    assert problem == f"{folder / 'shard-000001.documents.npy'}: missing"


def test_storage_that_fails_is_told_apart(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other shards are verified all the same."""
    folder = Path(make_numbered(LENGTHS).path)
    index = read_index(folder)
    monkeypatch.setattr("data_pipeline.storage.local.os.pread", _broken)
    options = StorageOptions(attempts=1, wait_seconds=0.0)
    problems = list(verify_folder(index, options))
    assert len(problems) == len(index.shards)
    assert all(isinstance(problem, Unread) for problem in problems)
    (folder / "shard-000002.tar").unlink()
    kinds = [isinstance(problem, Unread) for problem in verify_folder(index, options)]
    assert kinds.count(False) == 1 and not kinds[2]


def _broken(descriptor: int, size: int, offset: int) -> bytes:
    raise OSError(5, "Input/output error")


def test_a_folder_behind_a_url_is_verified(make_numbered: MakeNumbered, tmp_path: Path) -> None:
    """A copy that has gone bad is fetched again before its shard is blamed."""
    folder = Path(make_numbered(LENGTHS).path)
    store = fsspec.filesystem("memory")
    url = "memory://verified"
    store.put(f"{folder}/", "/verified/", recursive=True)
    try:
        options = StorageOptions(cache_dir=str(tmp_path / "cache"))
        index = read_index(url, open_storage(url, options))
        assert not list(verify_folder(index, options))
        copies = sorted((tmp_path / "cache").rglob("shard-000001.tar.*"))
        assert len(copies) == 1
        flip(copies[0], 1030)
        assert not list(verify_folder(index, options))
        with store.open("/verified/shard-000002.tar", "rb") as file:
            contents = bytearray(file.read())
        contents[1030] ^= 1
        store.pipe("/verified/shard-000002.tar", bytes(contents))
        for copy in (tmp_path / "cache").rglob("shard-000002.tar.*"):
            copy.unlink()
        (problem,) = verify_folder(index, StorageOptions(2, 0.0, str(tmp_path / "cache")))
        assert "memory://verified/shard-000002.tar" in problem
        assert not isinstance(problem, Unread)
    finally:
        store.rm("/verified", recursive=True)


def test_a_killed_process_ends_the_verification(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a word on what to do: it must neither hang nor pass."""
    index = read_index(make_numbered(LENGTHS).path)
    monkeypatch.setattr("data_pipeline.inspection.verify._verify", _kill_itself)
    with pytest.raises(RuntimeError, match="fewer --workers"):
        list(verify_folder(index, workers=2))


def _kill_itself(shard: Shard) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_there_is_a_core() -> None:
    """So that the default number of processes is one that can be used."""
    assert available_cores() >= 1
