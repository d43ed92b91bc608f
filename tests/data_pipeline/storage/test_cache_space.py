"""Room in the cache: the bound, which copies go first, full disks, processes that are killed."""

from __future__ import annotations

import errno
import fcntl
import functools
import multiprocessing
import os
import signal
import tempfile
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InputError, StorageError
from data_pipeline.storage.cache_space import CacheSpace, Entry, Partial
from data_pipeline.storage.locks import is_locked
from tests.support.cache_processes import (
    CHUNK_BYTES,
    FolderStore,
    bytes_in,
    copies_in,
    files_in,
    read_at_random,
    stall_in_download,
)

SHARD = bytes(range(256)) * 16
SPAWN = multiprocessing.get_context("spawn")
START_SECONDS = 120


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """A store of the shards a to d of one size, and a cache with room for two of them."""
    store = FolderStore(tmp_path / "store", tmp_path / "cache", 2 * len(SHARD) + 100)
    for name in "abcd":
        store.put(name, name.encode() + SHARD)
    return store


def test_the_copy_that_was_not_used_for_longest_goes_first(store: FolderStore) -> None:
    for name in "abac":
        store.read(name)
    assert copies_in(store.cache_dir) == ["a", "c"]
    store.read("b")
    assert copies_in(store.cache_dir) == ["b", "c"]
    assert store.downloads == list("abcb")


def test_a_removed_copy_is_read_on_by_whoever_has_it_open(store: FolderStore) -> None:
    file = store.open("a")
    for name in "bcd":
        store.read(name)
    assert "a" not in copies_in(store.cache_dir)
    assert file.pread(10**6, 0) == b"a" + SHARD


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    reads=st.lists(st.integers(0, 5), max_size=15),
    cache_bytes=st.integers(3000, 9000),
)
def test_the_sum_stays_within_the_bound_at_every_chunk(
    sizes: list[int], reads: list[int], cache_bytes: int
) -> None:
    kept: OrderedDict[int, int] = OrderedDict()  # what least recently used means
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder) / "store", Path(folder) / "cache", cache_bytes)
        for number, size in enumerate(sizes):
            store.put(str(number), bytes([number]) * size)

        def checked(name: str) -> Generator[bytes]:
            for chunk in store.chunks(name)():
                assert bytes_in(store.cache_dir) <= cache_bytes
                yield chunk
                assert bytes_in(store.cache_dir) <= cache_bytes

        for read in reads:
            number = read % len(sizes)
            name, size = str(number), sizes[number]
            file = store.cache.open(
                name, size, store.digest(name), functools.partial(checked, name)
            )
            assert file.pread(10**6, 0) == bytes([number]) * size
            if number not in kept:
                while sum(kept.values()) + size > cache_bytes:
                    kept.popitem(last=False)
                kept[number] = size
            kept.move_to_end(number)
            assert copies_in(store.cache_dir) == sorted(map(str, kept))
            assert bytes_in(store.cache_dir) <= cache_bytes


def test_files_of_others_stay_and_do_not_count(store: FolderStore) -> None:
    store.read("a")
    (copy,) = files_in(store.cache_dir)
    foreign = [
        store.cache_dir / "notes.txt",
        store.cache_dir / copy.name,
        store.cache_dir / "photos" / copy.name,
        copy.parent / "shard-000000.tar",
        copy.parent / f"{copy.name}.bak",
        copy.parent / "x.partial-1",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(SHARD)
    for name in "bcdab":
        store.read(name)
    assert all(path.read_bytes() == SHARD for path in foreign)
    assert [path.name[0] for path in files_in(store.cache_dir) if path not in foreign] == ["a", "b"]
    assert store.downloads == list("abcdab")


def test_a_bound_that_was_lowered_is_met_by_the_next_download(store: FolderStore) -> None:
    store.read("a"), store.read("b")
    lower = FolderStore(store.folder, store.cache_dir, len(SHARD) + 1)
    lower.read("c")
    assert copies_in(store.cache_dir) == ["c"]


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_takes_fewer_copies_than_allowed(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, full: int
) -> None:
    reserve = os.posix_fallocate

    def reserve_on_a_small_disk(descriptor: int, offset: int, size: int) -> None:
        if bytes_in(store.cache_dir) + size > len(SHARD) + 100:
            raise OSError(full, os.strerror(full))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve_on_a_small_disk)
    for name in "abcb":
        assert store.read(name) == name.encode() + SHARD
    assert copies_in(store.cache_dir) == ["b"]
    assert store.downloads == list("abcb")


def test_a_disk_that_is_full_of_other_things_is_named(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.read("a")
    monkeypatch.setattr(os, "posix_fallocate", raise_disk_full)
    expected = rf"^data.cache_dir = {store.cache_dir}: disk full, .* {len(SHARD) + 1} bytes, \d+ ar"
    with pytest.raises(StorageError, match=expected):
        store.read("b")
    assert not files_in(store.cache_dir)
    monkeypatch.undo()
    assert store.read("b") == b"b" + SHARD


def raise_disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raise_not_supported(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_disk_that_runs_full_in_a_download_is_emptied_of_copies(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot reserve bytes takes the file and then refuses to fill it."""
    monkeypatch.setattr(os, "posix_fallocate", raise_not_supported)
    store.read("a")
    write = os.write

    def write_if_there_is_room(descriptor: int, chunk: bytes) -> int:
        if copies_in(store.cache_dir):
            raise_disk_full()
        return write(descriptor, chunk[:700])  # a write may be short, too

    monkeypatch.setattr(os, "write", write_if_there_is_room)
    assert store.read("b") == b"b" + SHARD
    assert copies_in(store.cache_dir) == ["b"] and store.downloads == list("abb")
    monkeypatch.setattr(os, "write", raise_disk_full)
    with pytest.raises(StorageError, match="disk full"):
        store.read("c")
    assert not files_in(store.cache_dir)


def test_a_disk_that_fails_is_named(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StorageError, match=r"cannot be written \(no disk\); .*data.cache_dir"):
        store.read("a")
    assert store.downloads == ["a"]  # the store is not to blame


def test_a_file_system_that_cannot_reserve_bytes_keeps_the_bound(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raise_not_supported)
    sums = []

    def watched() -> Generator[bytes]:
        for chunk in store.chunks("a")():
            sums.append(bytes_in(store.cache_dir))
            yield chunk

    store.cache.open("a", len(SHARD) + 1, store.digest("a"), watched)
    assert len(sums) > 1 and set(sums) == {len(SHARD) + 1}


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_dir_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache_dir = tmp_path / "file" / below
    store = FolderStore(tmp_path / "store", cache_dir, 10**6)
    store.put("a", SHARD)
    with pytest.raises(InputError, match=f"^data.cache_dir = {cache_dir}: cannot be used .*; name"):
        store.read("a")


@pytest.mark.parametrize("problem", [errno.EACCES, errno.EROFS, errno.ENOLCK])
def test_a_cache_dir_that_cannot_be_written_or_locked_is_refused(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=rf"cannot be used \({os.strerror(problem)}\)"):
        store.read("a")


def test_an_abandoned_download_is_removed_and_one_in_progress_is_not(tmp_path: Path) -> None:
    space = CacheSpace(str(tmp_path), 100)
    copy = tmp_path / ("0" * 16) / f"shard.{'1' * 16}"
    other = copy.with_name(f"other.{'2' * 16}")
    copy.parent.mkdir()
    abandoned = copy.with_name(f"{copy.name}.partial-1")
    abandoned.write_bytes(bytes(70))
    partial = space.reserve(copy, 60)
    assert isinstance(partial, Partial) and not abandoned.exists() and is_locked(partial.path)
    for wanted in (copy, other):  # the same shard, and one for which there is no room
        in_the_way = space.reserve(wanted, 60)
        assert isinstance(in_the_way, Entry) and in_the_way.path == partial.path
    small = space.reserve(other, 40)
    assert isinstance(small, Partial) and bytes_in(tmp_path) == 100
    small.discard()
    with space.locked():
        partial.become(copy)
    partial.discard()
    assert space.reserve(copy, 60) is None
    assert files_in(tmp_path) == [copy]


@pytest.mark.parametrize("with_child", [False, True], ids=["alone", "survived by a child"])
def test_a_killed_download_is_taken_over(store: FolderStore, with_child: bool) -> None:
    ours, theirs = SPAWN.Pipe()
    given = (store.folder, store.cache_dir, store.cache_bytes, "a", with_child, theirs)
    process = SPAWN.Process(target=stall_in_download, args=given)
    process.start()
    child = 0
    try:
        assert ours.poll(START_SECONDS)
        child = ours.recv()
        (partial,) = files_in(store.cache_dir)
        assert partial.name.endswith(f".partial-{process.pid}") and is_locked(str(partial))
        assert partial.stat().st_size == len(SHARD) + 1
        process.kill()
        process.join()
        assert not is_locked(str(partial))
        assert store.read("b") == b"b" + SHARD  # somebody else's download clears it away
        assert copies_in(store.cache_dir) == ["b"]
        assert store.read("a") == b"a" + SHARD
        assert copies_in(store.cache_dir) == ["a", "b"]
    finally:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(("num_kept", "num_reads"), [(6, 12), (2, 12)])
def test_processes_share_a_cache(tmp_path: Path, num_kept: int, num_reads: int) -> None:
    """Each checks what it reads; where there is room for all, each shard is downloaded once."""
    shards = {f"{number}": bytes([number]) * (3 * CHUNK_BYTES + number) for number in range(6)}
    cache_bytes = num_kept * (3 * CHUNK_BYTES + 6)
    store = FolderStore(tmp_path / "store", tmp_path / "cache", cache_bytes)
    for name, contents in shards.items():
        store.put(name, contents)
    pipes = [SPAWN.Pipe() for _ in range(3)]
    processes = [
        SPAWN.Process(
            target=read_at_random,
            args=(store.folder, store.cache_dir, cache_bytes, seed, num_reads, theirs),
        )
        for seed, (_, theirs) in enumerate(pipes)
    ]
    space, sums = CacheSpace(str(store.cache_dir), cache_bytes), []
    try:
        for process in processes:
            process.start()
        for ours, _ in pipes:
            assert ours.poll(START_SECONDS)
            ours.recv()
        for ours, _ in pipes:
            ours.send(None)
        while any(process.is_alive() for process in processes):
            with space.locked():  # or a file may be seen under both its names
                sums.append(bytes_in(store.cache_dir))
            processes[0].join(0.001)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert 0 < max(sums) <= cache_bytes
    assert bytes_in(store.cache_dir) <= cache_bytes
    assert not [path for path in files_in(store.cache_dir) if "partial" in path.name]
    if num_kept == len(shards):
        assert sorted(store.downloads) == sorted(shards)
    else:
        assert len(store.downloads) > len(shards)
