"""Web servers that never come to an end cost bounded time and memory, and are named."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.commands.inspection import run_verify
from data_pipeline.config import SourceConfig
from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.storage import patience, remote_folder
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.patience import Pace
from data_pipeline.storage.remote_folder import RemoteFolder
from tests.support.endless_server import MOST_SENT, EndlessServer, serving
from tests.support.fake_clock import FakeClock
from tests.support.faulty_stores import without_aiohttp

pytestmark = without_aiohttp
SHARD = bytes(range(256)) * 40
TOO_SLOW = r"after 2 attempts \(\d+ bytes in \d+ s, too slow"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EndlessServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "index.json").write_bytes(b"{}" * 500)
    (folder / "a.tar").write_bytes(SHARD)
    with serving(folder) as state:
        yield state


@pytest.fixture
def store(server: EndlessServer, tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(server.url, StorageOptions(2, 0.0, str(tmp_path / "cache")))


@pytest.fixture
def seconds_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of a stream takes five seconds of a clock of its own."""
    clock = FakeClock(tick=5.0)

    def now() -> float:
        clock.sleep(2.5)
        return clock.now()

    monkeypatch.setattr(remote_folder, "Pace", lambda: Pace(now))


def open_shard(store: RemoteFolder) -> bytes:
    file = store.open("a.tar", len(SHARD), hashlib.sha256(SHARD).digest())
    return bytes(file.pread(len(SHARD), 0))


READS: dict[str, Callable[[RemoteFolder], object]] = {
    "": RemoteFolder.names,
    "index.json": lambda store: store.read_bytes("index.json"),
    "a.tar": open_shard,
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.usefixtures("seconds_pass")
def test_a_byte_now_and_then_is_given_up(
    name: str, server: EndlessServer, store: RemoteFolder
) -> None:
    assert READS[name](store)  # the same clock
    store.distrust("a.tar")
    server.trickled.add(name)
    with pytest.raises(StorageError, match=TOO_SLOW) as error:
        READS[name](store)
    assert str(error.value).startswith(f"{server.url}/{name}".rstrip("/") + ": ")


@pytest.mark.parametrize("name", READS)
def test_headers_that_trickle_are_given_up(
    name: str, server: EndlessServer, store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.never_answered.add(name)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(StorageError, match=r"2 attempts \(no answer in") as error:
        READS[name](store)
    assert server.url in str(error.value)


def test_a_listing_without_an_end_is_refused(
    server: EndlessServer, store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "MOST_LISTING_BYTES", 2**20)
    assert store.names() == ["a.tar", "index.json"]
    server.endless.add("")
    with pytest.raises(StorageError, match=r": its listing goes on after 1,048,576 bytes") as error:
        store.names()
    assert str(error.value).startswith(server.url)
    assert 2**20 <= server.sent < MOST_SENT // 2


def test_more_than_was_declared_is_not_read_on(server: EndlessServer, store: RemoteFolder) -> None:
    server.endless.add("index.json")
    with pytest.raises(StorageError, match=r"index\.json: .* of 1000 bytes arrived"):
        store.read_bytes("index.json")
    assert server.sent < MOST_SENT // 2


def test_a_file_of_no_declared_size_is_read_up_to_the_largest(
    server: EndlessServer, store: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.endless.add("index.json")
    monkeypatch.setattr(remote_folder, "_size", lambda *_: None)
    monkeypatch.setattr(remote_folder, "most_bytes", lambda _: 2**20)
    with pytest.raises(
        InputError, match=r"index\.json: .* bytes or more, must be at most 1,048,576"
    ):
        store.read_bytes("index.json")
    assert server.sent < MOST_SENT // 2


def test_a_shard_without_an_end_is_damaged(server: EndlessServer, store: RemoteFolder) -> None:
    assert open_shard(store) == SHARD
    store.distrust("a.tar")
    server.endless.add("a.tar")
    with pytest.raises(DamagedDataError, match=r"longer than the 10240 bytes written"):
        open_shard(store)
    assert server.sent < MOST_SENT // 2


@pytest.mark.usefixtures("seconds_pass")
def test_verify_names_the_shard_and_the_listing(
    make_numbered: Callable[..., SourceConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends as for a storage that failed, having read the other shards."""
    monkeypatch.setattr(remote_folder, "MOST_LISTING_BYTES", 2**20)
    monkeypatch.setattr("data_pipeline.storage.retries.time.sleep", lambda _: None)
    folder = make_numbered([30, 5, 1, 20, 9, 44]).path
    with serving(Path(folder)) as server:
        cache = tmp_path / "cache"
        arguments = argparse.Namespace(location=server.url, workers=1, cache_dir=str(cache))
        assert run_verify(arguments) == 0
        assert "all as written" in capsys.readouterr().out
        for copy in cache.rglob("shard-000001.tar.*"):
            copy.unlink()
        server.trickled.add("shard-000001.tar")
        server.endless.add("")
        with pytest.raises(StorageError, match="not read: 1 shards"):
            run_verify(arguments)
        shown = capsys.readouterr()
    (problem,) = shown.out.splitlines()
    assert problem.startswith(f"{server.url}/shard-000001.tar: cannot be read after 5 attempts (")
    assert f"{server.url}: lists no files" in shown.err and "goes on after 1,048,576" in shown.err


def test_a_folder_that_may_not_be_listed_is_verified_all_the_same(
    make_numbered: Callable[..., SourceConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many web servers forbid it."""
    with serving(Path(make_numbered([30, 5]).path)) as server:
        server.forbidden.add("")
        run_verify(argparse.Namespace(location=server.url, workers=1, cache_dir=str(tmp_path)))
    shown = capsys.readouterr()
    assert "all as written" in shown.out
    assert f"{server.url}: lists no files" in shown.err and "permission denied" in shown.err
