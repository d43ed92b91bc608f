"""Files that are none and servers that never come to an end cost bounded time and memory."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import InputError, StorageError
from data_pipeline.reading.shards import open_documents
from data_pipeline.small_file import read_small
from data_pipeline.storage import patience, remote_folder
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.remote_folder import RemoteFolder
from data_pipeline.tokenizer import load_tokenizer
from tests.support.damage import change_index
from tests.support.faulty_stores import FaultyFileSystem
from tests.support.samples import check_sources
from tests.support.tiny_shards import NUMBERED_VOCAB, config_of, one_line

KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
    "huge": lambda path: _sparse(path, 2**40),
}
NAMES = ("index.json", "shards.npy", "tokenizer.json", "*.documents.npy", "*.tar")


SHARD = bytes(range(256)) * 40


def _sparse(path: Path, num_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(num_bytes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_in_a_shard_folder_is_named_at_once(
    name: str, kind: str, make_numbered: Callable[..., SourceConfig]
) -> None:
    source = make_numbered([30, 5, 1])
    read_whole(source)  # sound before
    path = sorted(Path(source.path).glob(name))[0]
    path.unlink()
    KINDS[kind](path)
    with pytest.raises((InputError, StorageError)) as error:
        read_whole(source)
    one_line(error)
    assert str(path) in str(error.value) or name == "shards.npy"
    assert source.path in str(error.value)


def open_shard(store: RemoteFolder) -> bytes:
    file = store.open("a.tar", len(SHARD), hashlib.sha256(SHARD).digest())
    return bytes(file.pread(len(SHARD), 0))


def read_whole(source: SourceConfig) -> None:
    """Everything of a folder that a run reads."""
    check_sources(config_of(source), NUMBERED_VOCAB)
    list(open_documents(source.path))


def test_a_tokenizer_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="is no ordinary file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_is_one_is_read(tmp_path: Path) -> None:
    """Also through a link; and one of the largest size is no larger."""
    path = tmp_path / "a.json"
    path.write_bytes(b"{}")
    (tmp_path / "b.json").symlink_to(path)
    assert read_small(path) == read_small(tmp_path / "b.json") == b"{}"


@pytest.fixture
def store() -> RemoteFolder:
    FaultyFileSystem.fill(**{"index.json": b"x" * 1000})
    return RemoteFolder("faulty://folder", StorageOptions(attempts=2, wait_seconds=0.0))


def test_a_file_of_a_store_that_says_to_be_huge_is_not_read(
    store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "most_bytes", lambda _: 1000)
    assert len(store.read_bytes("index.json")) == 1000
    monkeypatch.setattr(remote_folder, "most_bytes", lambda _: 999)
    with pytest.raises(InputError, match=r"index\.json: 1,000 bytes or more, must be at most 999"):
        store.read_bytes("index.json")


def test_a_store_that_tells_no_size_is_read_no_further_than_a_file_may_be(
    store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "_size", lambda *_: None)
    assert len(store.read_bytes("index.json")) == 1000
    monkeypatch.setattr(remote_folder, "most_bytes", lambda _: 999)
    with pytest.raises(InputError, match="1,000 bytes or more, must be at most 999"):
        store.read_bytes("index.json")


class Stuck(io.BytesIO):
    """A file of a store whose read does not return while the test goes on."""

    returns = threading.Event()
    closed_early = False

    def read(self, size: int | None = -1) -> bytes:
        self.returns.wait()
        return b""

    def close(self) -> None:
        Stuck.closed_early |= not self.returns.is_set()
        super().close()


def test_a_read_of_a_store_that_does_not_return_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor is the file closed meanwhile, which could wait for the read."""
    FaultyFileSystem.fill(**{"a.tar": SHARD})
    store = RemoteFolder("faulty://folder", StorageOptions(2, 0.0, str(tmp_path)))
    assert open_shard(store)
    store.distrust("a.tar")
    monkeypatch.setattr(FaultyFileSystem, "_open", lambda *_, **__: Stuck())
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(remote_folder, "CHUNK_BYTES", 1)
    monkeypatch.setattr(remote_folder, "_size", lambda *_: None)
    with pytest.raises(
        StorageError, match=r"^faulty://folder/a\.tar: .* 2 attempts \(no answer in"
    ):
        open_shard(store)
    assert not Stuck.closed_early
    Stuck.returns.set()


def test_an_index_that_is_refused_keeps_its_own_way_out(
    make_numbered: Callable[..., SourceConfig],
) -> None:
    source = make_numbered([30])
    path = Path(source.path) / "index.json"
    change_index(Path(source.path), lambda contents: None)
    shutil.move(path, path.with_suffix(".old"))
    os.mkfifo(path)
    with pytest.raises(InputError, match="put the file itself there") as error:
        read_whole(source)
    assert "--overwrite" not in str(error.value)
