"""Processes that share a cache of shards, and the store that they download from."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Generator
from multiprocessing.connection import Connection
from pathlib import Path

from data_pipeline.storage.cache import Chunks, ShardCache
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.local import LocalFile

CHUNK_BYTES = 1000


class FolderStore:
    """A folder that stands for a store, and a cache of it; a file records the downloads."""

    def __init__(self, folder: Path, cache_dir: Path, cache_bytes: int) -> None:
        self.folder, self.cache_dir, self.cache_bytes = folder, cache_dir, cache_bytes
        options = StorageOptions(attempts=3, wait_seconds=0.0, cache_bytes=cache_bytes)
        self.cache = ShardCache(f"store://{folder.name}", str(cache_dir), options)
        self._log = folder.with_suffix(".log")
        folder.mkdir(exist_ok=True)

    def put(self, name: str, contents: bytes) -> None:
        (self.folder / name).write_bytes(contents)

    def digest(self, name: str) -> bytes:
        return hashlib.sha256((self.folder / name).read_bytes()).digest()

    def chunks(self, name: str, pause: float = 0.0) -> Chunks:
        def download() -> Generator[bytes]:
            with self._log.open("a") as log:
                log.write(f"{name}\n")
            with (self.folder / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                    time.sleep(pause)

        return download

    def open(self, name: str, written: bytes | None = None, pause: float = 0.0) -> LocalFile:
        """Opens a shard whose bytes should be `written`; None: those that are there."""
        contents = (self.folder / name).read_bytes() if written is None else written
        digest = hashlib.sha256(contents).digest()
        return self.cache.open(name, len(contents), digest, self.chunks(name, pause))

    def read(self, name: str, written: bytes | None = None, pause: float = 0.0) -> bytes:
        return self.open(name, written, pause).pread(10**9, 0)

    @property
    def downloads(self) -> list[str]:
        """Names of the shards, once for each download that was started."""
        return self._log.read_text().split() if self._log.exists() else []


def files_in(cache_dir: Path) -> list[Path]:
    """The files of a cache, but for its lock."""
    return sorted(path for path in cache_dir.glob("*/*") if path.is_file())


def copies_in(cache_dir: Path) -> list[str]:
    """The names of the shards of which there are copies, each a single character."""
    return [path.name[0] for path in files_in(cache_dir) if ".partial-" not in path.name]


def bytes_in(cache_dir: Path) -> int:
    """The bytes of a cache, downloads in progress included."""
    return sum(path.stat().st_size for path in files_in(cache_dir))


def read_at_random(
    folder: Path, cache_dir: Path, cache_bytes: int, seed: int, num_reads: int, start: Connection
) -> None:
    """Says when it is ready, waits for the start, reads and checks what it reads."""
    store = FolderStore(folder, cache_dir, cache_bytes)
    names = sorted(os.listdir(folder))
    draw = random.Random(seed)
    start.send(None)
    start.recv()
    for _ in range(num_reads):
        name = draw.choice(names)
        assert store.read(name, pause=0.0005) == (folder / name).read_bytes()


def stall_in_download(
    folder: Path,
    cache_dir: Path,
    cache_bytes: int,
    name: str,
    with_child: bool,
    ready: Connection,
) -> None:
    """Downloads a chunk and no more; sends the number of the child that it forks then, or 0."""
    store = FolderStore(folder, cache_dir, cache_bytes)
    contents = (folder / name).read_bytes()

    def download() -> Generator[bytes]:
        yield contents[:CHUNK_BYTES]
        if not with_child:
            ready.send(0)
        elif os.fork() == 0:
            ready.send(os.getpid())
        time.sleep(600)

    store.cache.open(name, len(contents), store.digest(name), download)
