"""One download for all, checked against the index, and found again after every failure."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.storage import cache
from data_pipeline.storage.cache import ShardCache
from data_pipeline.storage.local import LocalFile
from tests.support.cache_processes import CHUNK_BYTES, FolderStore, copies_in, files_in

SHARD = bytes(range(256)) * 16


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """A store of the shards a, b and c, and a cache with room for two of them."""
    store = FolderStore(tmp_path / "store", tmp_path / "cache", 2 * len(SHARD) + 100)
    for name in ("a", "b", "c"):
        store.put(name, name.encode() + SHARD)
    return store


def flipped(contents: bytes) -> bytes:
    return contents[:50] + bytes([contents[50] ^ 1]) + contents[51:]


def test_a_shard_is_downloaded_once(store: FolderStore) -> None:
    for _ in range(3):
        assert store.read("a") == b"a" + SHARD
    other = FolderStore(store.folder, store.cache_dir, store.cache_bytes)
    assert other.open("a").pread(10, 20) == (b"a" + SHARD)[20:30]
    assert store.downloads == ["a"] and copies_in(store.cache_dir) == ["a"]


def test_a_copy_that_somebody_has_changed_is_downloaded_again(
    store: FolderStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its checksums are right: a process hashes each copy that it did not make, once."""
    assert store.read("a") == b"a" + SHARD
    (path,) = [path for path in files_in(store.cache_dir) if path.name.startswith("a.")]
    path.write_bytes(b"z" + SHARD)
    other = FolderStore(store.folder, store.cache_dir, store.cache_bytes)
    assert other.read("a") == b"a" + SHARD and other.downloads == ["a", "a"]
    assert "not the shard that was written, downloaded again" in caplog.text
    # what this process has downloaded or hashed itself costs nothing more
    hashed: list[int] = []
    exact = cache._digest

    def counted(file: LocalFile, size: int) -> bytes:
        hashed.append(size)
        return exact(file, size)

    monkeypatch.setattr(cache, "_digest", counted)
    for _ in range(3):
        other.read("a")
    assert hashed == []
    third = FolderStore(store.folder, store.cache_dir, store.cache_bytes)
    for _ in range(3):
        third.read("a")
    assert hashed == [len(b"a" + SHARD)] and third.downloads == ["a", "a"]


def test_folders_of_two_urls_are_kept_apart(store: FolderStore, tmp_path: Path) -> None:
    other = FolderStore(tmp_path / "other", store.cache_dir, store.cache_bytes)
    other.put("a", b"another a")
    assert (store.read("a"), other.read("a")) == (b"a" + SHARD, b"another a")
    assert copies_in(store.cache_dir) == ["a", "a"]


def test_a_shard_written_anew_under_its_name_is_not_taken_for_the_old_one(
    store: FolderStore,
) -> None:
    old = store.open("a")
    store.put("a", b"A" + SHARD)
    assert store.read("a") == b"A" + SHARD
    assert old.pread(1, 0) == b"a"


def test_threads_of_a_process_share_a_download(store: FolderStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: store.read("a", pause=0.001), range(8)))
    assert found == [b"a" + SHARD] * 8
    assert store.downloads == ["a"]


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        (flipped(b"a" + SHARD), "SHA-256"),
        (b"a" + SHARD[:-100], f"{len(SHARD) - 99} bytes long, {len(SHARD) + 1} were written"),
        (b"", "0 bytes long"),
        (b"a" + SHARD + b"!", f"longer than the {len(SHARD) + 1} bytes written"),
    ],
    ids=["flipped", "cut", "empty", "longer"],
)
def test_a_store_with_other_bytes_is_damaged(
    store: FolderStore, stored: bytes, problem: str
) -> None:
    store.put("a", stored)
    with pytest.raises(DamagedDataError, match=rf"^store://store/a: damaged, .*{problem}"):
        store.read("a", written=b"a" + SHARD)
    assert store.downloads == ["a"] * 3  # one may have gone wrong on its way
    with pytest.raises(DamagedDataError, match=problem):
        store.read("a", written=b"a" + SHARD)
    assert store.downloads == ["a"] * 3
    assert not files_in(store.cache_dir)
    assert store.read("b") == b"b" + SHARD


def test_a_download_that_went_wrong_on_its_way_is_done_again(store: FolderStore) -> None:
    parts = [
        [b"a" + SHARD[:100]],
        [flipped(b"a" + SHARD)],
        [b"a", SHARD],
    ]
    digest = store.digest("a")
    file = store.cache.open("a", len(SHARD) + 1, digest, lambda: (yield from parts.pop(0)))
    assert file.pread(10**6, 0) == b"a" + SHARD
    assert not parts


def test_a_store_that_does_not_answer_is_no_statement_on_the_shard(store: FolderStore) -> None:
    attempts = []

    def fail() -> Generator[bytes]:
        attempts.append(1)
        yield SHARD[:10]
        raise ConnectionError("hung up")

    with pytest.raises(StorageError, match=r"store://store/a: .* 3 attempts \(hung up\)"):
        store.cache.open("a", len(SHARD) + 1, store.digest("a"), fail)
    assert len(attempts) == 3
    assert not files_in(store.cache_dir)
    assert store.read("a") == b"a" + SHARD


def test_a_shard_that_the_store_lacks_is_missing(store: FolderStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("d", written=b"d" + SHARD)
    assert store.downloads == ["d"] and not files_in(store.cache_dir)


def test_wrong_bytes_in_a_copy_are_downloaded_again_once_it_is_forgotten(
    store: FolderStore,
) -> None:
    store.read("a"), store.read("b")
    (copy, _) = files_in(store.cache_dir)
    copy.write_bytes(flipped(copy.read_bytes()))
    assert store.read("a") == flipped(b"a" + SHARD)  # the reader has checksums of its own
    assert store.cache.forget("a")
    assert copies_in(store.cache_dir) == ["b"]
    assert store.read("a") == b"a" + SHARD
    assert store.downloads == ["a", "b", "a"]


def test_a_copy_that_another_reader_forgot_first_was_there_too(store: FolderStore) -> None:
    other = FolderStore(store.folder, store.cache_dir, store.cache_bytes)
    assert not store.cache.forget("a")
    store.read("a"), other.read("a")
    assert other.cache.forget("a") and not files_in(store.cache_dir)
    assert store.cache.forget("a")
    assert not store.cache.forget("b")


def test_a_copy_that_was_cut_is_downloaded_again(store: FolderStore) -> None:
    store.read("a")
    (copy,) = files_in(store.cache_dir)
    os.truncate(copy, 10)
    assert store.read("a") == b"a" + SHARD
    assert store.downloads == ["a", "a"]


def test_a_cache_that_is_deleted_meanwhile_is_filled_again(store: FolderStore) -> None:
    file = store.open("a")
    for path in (*files_in(store.cache_dir), store.cache_dir / "lock"):
        path.unlink()
    assert store.read("a") == file.pread(10**6, 0) == b"a" + SHARD


def test_a_download_that_is_deleted_meanwhile_is_no_missing_shard(store: FolderStore) -> None:
    def download() -> Generator[bytes]:
        yield b"a" + SHARD
        for path in files_in(store.cache_dir):
            path.unlink()

    with pytest.raises(StorageError, match="cache_dir"):
        store.cache.open("a", len(SHARD) + 1, store.digest("a"), download)


def test_a_shard_larger_than_the_cache_is_refused(store: FolderStore) -> None:
    store.put("d", SHARD * 3)
    with pytest.raises(InputError, match=rf"data.cache_bytes = {store.cache_bytes}: .*store/d"):
        store.read("d")
    assert store.downloads == []


def test_a_slow_download_of_another_is_waited_for_and_named(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(cache, "SAYS_WAITING_SECONDS", 0.0)
    started, go_on = threading.Event(), threading.Event()

    def slow() -> Generator[bytes]:
        yield b"a"
        started.set()
        assert go_on.wait(60)
        yield SHARD

    def hear(record: logging.LogRecord) -> bool:
        go_on.set()
        return True

    monkeypatch.setattr(cache.logger, "filters", [hear])
    other = FolderStore(store.folder, store.cache_dir, store.cache_bytes)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.cache.open, "a", len(SHARD) + 1, store.digest("a"), slow)
        assert started.wait(60)
        assert other.read("a") == first.result().pread(10**6, 0) == b"a" + SHARD
    assert other.downloads == []
    waiting = [record.getMessage() for record in caplog.records]
    assert waiting[0].startswith("store://store/a: waiting for ")
    assert f"until process {os.getpid()} has downloaded {store.cache_dir}" in waiting[0]


def test_a_download_never_takes_more_than_its_share(store: FolderStore) -> None:
    sizes = []

    def endless() -> Generator[bytes]:
        while True:
            yield SHARD[:CHUNK_BYTES]
            sizes.append(sum(path.stat().st_size for path in files_in(store.cache_dir)))

    with pytest.raises(DamagedDataError, match="longer"):
        store.cache.open("a", len(SHARD) + 1, store.digest("a"), endless)
    assert set(sizes) == {len(SHARD) + 1}


def test_no_folder_is_made_before_the_first_shard(store: FolderStore) -> None:
    assert isinstance(store.cache, ShardCache)
    assert not store.cache_dir.exists()
