"""Files that are none and servers that never come to an end cost bounded time and memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import InputError, StorageError
from data_pipeline.reading.shards import open_documents
from data_pipeline.small_file import read_small
from data_pipeline.storage import remote_folder
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


def read_whole(source: SourceConfig) -> None:
    """Everything of a folder that a run reads."""
    check_sources(config_of(source), NUMBERED_VOCAB)
    list(open_documents(source.path))


def test_a_tokenizer_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="no such file"):
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


class Stream(BytesIO):
    """What a web server sends: a byte at a time, and time passes."""

    def __init__(self, contents: bytes, seconds: float, clock: list[float]) -> None:
        super().__init__(contents)
        self._seconds, self._clock = seconds, clock

    def read(self, size: int | None = -1) -> bytes:
        self._clock[0] += self._seconds
        return super().read(1)


def streamed(
    store: RemoteFolder, monkeypatch: pytest.MonkeyPatch, num_bytes: int, seconds: float
) -> int:
    """Reads a web file of so many bytes, one each so many seconds; the bytes, or what is raised."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(store, "_is_web", True)
    FaultyFileSystem.fill(**{"index.json": b"x" * num_bytes})
    monkeypatch.setattr(
        FaultyFileSystem, "_open", lambda *_, **__: Stream(b"x" * num_bytes, seconds, clock)
    )
    return len(store.read_bytes("index.json"))


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(
    store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="too slow to wait for") as error:
        streamed(store, monkeypatch, 1000, seconds=5.0)
    assert "13 bytes in 65 s" in str(error.value)
    # the control: a slow one that comes to its end
    assert streamed(store, monkeypatch, 1000, seconds=0.05) == 1000


def test_a_server_that_never_ends_is_given_up(
    store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells no size, or a wrong one."""
    monkeypatch.setattr(remote_folder, "_size", lambda *_: None)
    monkeypatch.setattr(remote_folder, "most_bytes", lambda _: 100)
    with pytest.raises(InputError, match="101 bytes or more, must be at most 100"):
        streamed(store, monkeypatch, 10_000, seconds=0.0)


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
