"""Shard folders by URL: several kinds of stores, what they say when they fail, and copies."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations

from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.reading.shards import ShardReader, open_documents
from data_pipeline.shard_format.index import read_index
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.open import open_storage
from data_pipeline.storage.remote_folder import RemoteFolder
from tests.support.faulty_stores import (
    BotoError,
    FaultyFileSystem,
    FlakyHandler,
    StatusError,
    caused,
    without_aiohttp,
)

SHARD = bytes(range(256)) * 40


@pytest.fixture
def options(tmp_path: Path) -> StorageOptions:
    return StorageOptions(3, 0.0, str(tmp_path / "cache"), 10**6)


@pytest.fixture
def faulty(options: StorageOptions) -> RemoteFolder:
    """A folder of index.json and a shard; faults are given to its class."""
    FaultyFileSystem.fill(**{"index.json": b"{}", "a.tar": SHARD})
    return RemoteFolder("faulty://folder", options)


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a folder in memory with a shard and index.json."""
    url = f"memory://{uuid.uuid4().hex}"
    system = fsspec.filesystem("memory")
    system.pipe({f"{url}/a.tar": SHARD, f"{url}/index.json": b"{}"})
    yield url
    if system.exists(url):
        system.rm(url, recursive=True)


def open_shard(folder: Any, contents: bytes = SHARD, name: str = "a.tar") -> bytes:
    file = folder.open(name, len(contents), hashlib.sha256(contents).digest())
    return bytes(file.pread(10**9, 0))


def test_a_folder_in_memory_is_read_like_one_on_a_path(
    memory: str, options: StorageOptions
) -> None:
    folder = open_storage(memory + "/", options)
    assert folder.location == memory and folder.path("a.tar") == f"{memory}/a.tar"
    assert folder.exists() and not open_storage(memory + "-other", options).exists()
    assert folder.names() == ["a.tar", "index.json"]
    assert folder.size("a.tar") == len(SHARD) and folder.read_bytes("index.json") == b"{}"
    assert open_shard(folder) == SHARD
    for read in (folder.size, folder.read_bytes, lambda name: open_shard(folder, SHARD, name)):
        with pytest.raises(FileNotFoundError):
            read("absent")
    with pytest.raises(FileNotFoundError):
        open_storage(memory + "-other", options).names()


def test_changes_in_a_store_are_seen_at_once(memory: str, options: StorageOptions) -> None:
    folder = open_storage(memory, options)
    assert folder.names() == ["a.tar", "index.json"] and folder.size("index.json") == 2
    fsspec.filesystem("memory").pipe({f"{memory}/b.tar": SHARD, f"{memory}/index.json": b"{  }"})
    assert folder.names() == ["a.tar", "b.tar", "index.json"] and folder.size("index.json") == 4


def test_a_copy_serves_after_the_store_has_gone(memory: str, options: StorageOptions) -> None:
    assert open_shard(open_storage(memory, options)) == SHARD
    fsspec.filesystem("memory").rm(memory, recursive=True)
    assert open_shard(open_storage(memory, options)) == SHARD
    folder = open_storage(memory, options)
    assert folder.distrust("a.tar")
    with pytest.raises(FileNotFoundError):
        open_shard(folder)


def test_wrong_bytes_in_a_copy_are_downloaded_again_once_distrusted(
    memory: str, options: StorageOptions
) -> None:
    folder = open_storage(memory, options)
    assert not folder.distrust("a.tar")
    assert open_shard(folder) == SHARD
    (copy,) = Path(str(options.cache_dir)).glob("*/a.tar.*")
    copy.write_bytes(bytes(len(SHARD)))
    assert open_shard(folder) == bytes(len(SHARD))
    assert folder.distrust("a.tar")
    assert open_shard(folder) == SHARD


def test_shards_need_a_cache_and_the_index_does_not(memory: str) -> None:
    folder = open_storage(memory, StorageOptions(1))
    assert folder.read_bytes("index.json") == b"{}" and not folder.distrust("a.tar")
    with pytest.raises(InputError, match=r"^data.cache_dir = None, must .*memory://.*; name"):
        open_shard(folder)


def test_a_folder_travels_to_other_processes(memory: str, options: StorageOptions) -> None:
    folder = open_storage(memory, options)
    assert open_shard(folder) == SHARD
    other = pickle.loads(pickle.dumps(folder))
    assert other.location == memory and open_shard(other) == SHARD


def test_a_forked_process_reads_on(memory: str, options: StorageOptions) -> None:
    folder = open_storage(memory, options)
    assert open_shard(folder) == SHARD
    context = multiprocessing.get_context("fork")
    process = context.Process(target=check_in_child, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def check_in_child(folder: RemoteFolder) -> None:
    assert folder.read_bytes("index.json") == b"{}"
    assert open_shard(folder) == SHARD and folder.distrust("a.tar")
    assert open_shard(folder) == SHARD


def test_an_unknown_protocol_is_refused(options: StorageOptions) -> None:
    with pytest.raises(InputError, match=r"^carrier-pigeon://x: fsspec .* knows no .*; name"):
        open_storage("carrier-pigeon://x", options)


def test_a_package_that_is_not_installed_is_named(
    options: StorageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"class": "absent_package.System", "err": "Install absent-package to read it"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(InputError, match=r"^absent://x: .*Install absent-package .*; run `pip"):
        open_storage("absent://x", options)


READS: list[Callable[[RemoteFolder], object]] = [
    RemoteFolder.names,
    RemoteFolder.exists,
    lambda folder: folder.size("a.tar"),
    lambda folder: folder.read_bytes("index.json"),
    open_shard,
]
each_read = pytest.mark.parametrize("read", READS, ids=["names", "exists", "size", "bytes", "open"])


@each_read
def test_a_failure_that_passes_is_not_noticed(
    read: Callable[[RemoteFolder], object], faulty: RemoteFolder
) -> None:
    expected = read(faulty)
    faulty.distrust("a.tar")
    FaultyFileSystem.faults = [StatusError(503), TimeoutError()]
    assert read(faulty) == expected
    assert not FaultyFileSystem.faults


@each_read
@pytest.mark.parametrize(
    "failure",
    [
        OSError("no answer"),
        RuntimeError("no answer"),
        StatusError(500),
        BotoError(503),
        caused(FileNotFoundError("a.tar"), ConnectionError("refused")),
        caused(FileNotFoundError("a.tar"), StatusError(502)),
    ],
    ids=repr,
)
def test_a_failure_that_stays_is_named(
    read: Callable[[RemoteFolder], object], failure: Exception, faulty: RemoteFolder
) -> None:
    """Also where a file system calls a file missing because its server does not answer."""
    FaultyFileSystem.faults = [failure] * 9
    with pytest.raises(StorageError, match=r"^faulty://folder.*: cannot be read after 3 attempts"):
        read(faulty)
    assert FaultyFileSystem.num_calls == 3


@pytest.mark.parametrize("read", READS[2:], ids=["size", "bytes", "open"])
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (StatusError(404), FileNotFoundError),
        (StatusError(410), FileNotFoundError),
        (BotoError(404), FileNotFoundError),
        (caused(FileNotFoundError("a"), StatusError(404)), FileNotFoundError),
        (caused(FileNotFoundError("a"), KeyError("a")), FileNotFoundError),
        (StatusError(403), InputError),
        (caused(FileNotFoundError("a"), StatusError(401)), InputError),
        (PermissionError("no"), InputError),
    ],
    ids=repr,
)
def test_what_a_store_says_of_a_file_is_believed_at_once(
    read: Callable[[RemoteFolder], object],
    failure: Exception,
    expected: type[Exception],
    faulty: RemoteFolder,
) -> None:
    FaultyFileSystem.faults = [failure]
    with pytest.raises(expected):
        read(faulty)
    assert FaultyFileSystem.num_calls == 1


def test_short_answers_are_asked_for_again(faulty: RemoteFolder) -> None:
    FaultyFileSystem.lost_bytes = [1, 2]
    assert faulty.read_bytes("index.json") == b"{}"
    FaultyFileSystem.lost_bytes = [1, len(SHARD)]
    assert open_shard(faulty) == SHARD
    assert not FaultyFileSystem.lost_bytes


def test_answers_that_stay_short_are_no_statement_on_the_file(faulty: RemoteFolder) -> None:
    FaultyFileSystem.lost_bytes = [1] * 3
    with pytest.raises(StorageError, match="1 of 2 bytes arrived"):
        faulty.read_bytes("index.json")
    FaultyFileSystem.lost_bytes = [5] * 3
    with pytest.raises(StorageError, match=f"{len(SHARD) - 5} of {len(SHARD)} bytes arrived"):
        open_shard(faulty)


@pytest.mark.parametrize(
    "stored", [SHARD[:-1], SHARD + b"!", b"\1" + SHARD[1:]], ids=["cut", "longer", "flipped"]
)
def test_a_store_that_has_other_bytes_is_damaged(stored: bytes, faulty: RemoteFolder) -> None:
    FaultyFileSystem.fill(**{"a.tar": stored})
    with pytest.raises(DamagedDataError, match=r"^faulty://folder/a.tar: damaged, .* 3 times"):
        open_shard(faulty)


@pytest.fixture
def web_folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address by which a server of this process serves it."""
    FlakyHandler.refusals, FlakyHandler.hang_ups = [], []
    root = tmp_path / "web" / "folder"
    root.mkdir(parents=True)
    (root / "a.tar").write_bytes(SHARD)
    (root / "index.json").write_bytes(b"{}")
    handler = functools.partial(FlakyHandler, directory=str(root.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield root, f"127.0.0.1:{server.server_port}/folder"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("protocol", ["plainweb", pytest.param("http", marks=without_aiohttp)])
def test_a_folder_on_a_web_server(
    protocol: str, web_folder: tuple[Path, str], options: StorageOptions
) -> None:
    root, address = web_folder
    folder = open_storage(f"{protocol}://{address}", options)
    assert folder.names() == ["a.tar", "index.json"] and folder.exists()
    assert folder.size("a.tar") == len(SHARD) and folder.read_bytes("index.json") == b"{}"
    for read in (folder.size, folder.read_bytes, lambda name: open_shard(folder, SHARD, name)):
        with pytest.raises(FileNotFoundError):
            read("absent")
    FlakyHandler.hang_ups = [100, 5000]
    assert open_shard(folder) == SHARD and not FlakyHandler.hang_ups
    FlakyHandler.refusals = [503] * 2
    assert folder.size("a.tar") == len(SHARD) and not FlakyHandler.refusals
    FlakyHandler.refusals = [500] * 99
    with pytest.raises(StorageError, match="3 attempts"):
        folder.size("a.tar")
    FlakyHandler.refusals = [403] * 99
    with pytest.raises(InputError, match="permission denied"):
        folder.read_bytes("index.json")
    FlakyHandler.refusals = []
    (root / "a.tar").write_bytes(SHARD[:-1])
    assert open_shard(folder) == SHARD and folder.distrust("a.tar")
    with pytest.raises(DamagedDataError, match=f"{len(SHARD) - 1} bytes long"):
        open_shard(folder)


@pytest.mark.parametrize("protocol", ["plainweb", pytest.param("http", marks=without_aiohttp)])
def test_a_server_that_is_not_there_lacks_no_file(protocol: str, options: StorageOptions) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), FlakyHandler) as server:
        address = f"127.0.0.1:{server.server_port}"  # nobody listens there from here on
    folder = open_storage(f"{protocol}://{address}/folder", options)
    for read in (folder.size, folder.read_bytes, lambda name: open_shard(folder, SHARD, name)):
        with pytest.raises(StorageError, match="3 attempts"):
            read("a.tar")


def put_corpus(path: Path, memory: str) -> str:
    fsspec.filesystem("memory").put(f"{path}/", f"{memory}/corpus/", recursive=True)
    return f"{memory}/corpus"


def test_documents_are_the_same_by_url_and_by_path(
    make_shards: Callable[..., Path], memory: str, options: StorageOptions
) -> None:
    path = make_shards()
    expected = list(open_documents(path))
    found = list(open_documents(put_corpus(path, memory), options=options))
    assert len(found) == len(expected) > 3
    for document, other in zip(found, expected, strict=True):
        assert document.id == other.id and document.tokens_T.tolist() == other.tokens_T.tolist()


def test_a_byte_that_flips_in_a_copy_is_brought_again_from_the_store(
    make_shards: Callable[..., Path], memory: str, options: StorageOptions
) -> None:
    path = make_shards()
    expected = [document.tokens_T.tolist() for document in open_documents(path)]
    folder = open_storage(put_corpus(path, memory), options)
    assert list(open_documents(folder.location, options=options))  # fills the cache
    copies = list(Path(str(options.cache_dir)).glob("*/*.tar.*"))
    for copy in copies:
        copy.write_bytes(bytes(byte ^ 1 for byte in copy.read_bytes()))
    reader = ShardReader(read_index(folder.location, folder), folder)
    found = [
        np.frombuffer(shard.tokens(document, 0, num_tokens), shard.dtype).tolist()
        for shard in (reader.shard(number) for number in range(len(reader.index.shards)))
        for document, num_tokens in enumerate(shard.num_tokens)
    ]
    assert copies and found == expected
