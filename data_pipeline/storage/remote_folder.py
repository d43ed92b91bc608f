"""Shard folders in object stores and on web servers, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec.core import get_filesystem_class, split_protocol, url_to_fs

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked
from data_pipeline.small_file import check_size, most_bytes
from data_pipeline.storage.cache import ShardCache
from data_pipeline.storage.interface import StorageOptions, StoredFile
from data_pipeline.storage.listing import MOST_LISTING_BYTES, linked_names
from data_pipeline.storage.patience import (
    LEAST_BYTES,
    PATIENCE_SECONDS,
    GaveUpError,
    Pace,
    within_patience,
)
from data_pipeline.storage.retries import with_retries

Result = TypeVar("Result")

CHUNK_BYTES = 8 * 2**20
LISTING_BYTES = 10 * LEAST_BYTES
"""What the listing of a store counts as where its pages are not seen."""
_NOT_FOUND = (404, 410)
_DENIED = (401, 403)


class RemoteFolder:
    """A shard folder behind a URL; any thread, and after a fork."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        """Connects to nothing yet.

        Raises:
            InputError: fsspec does not know the protocol, or lacks a package for it.
        """
        # A bare protocol is a root of its own; its slashes are no trailing ones.
        self._url = url if url.endswith("://") else url.rstrip("/")
        self._options = options
        protocols = _known_protocols(url)
        self._is_web = protocols[0] in ("http", "https")
        self._settings = _web_settings() if self._is_web else {}
        self._cache: ShardCache | None = None
        if options.cache_dir:
            # copies stay good under another password
            self._cache = ShardCache(masked(self._url), options.cache_dir, options)

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str, StorageOptions]]:
        """Goes to another process as its URL: connections do not travel."""
        return RemoteFolder, (self._url, self._options)

    @property
    def location(self) -> str:
        return self._url

    def path(self, name: str) -> str:
        return f"{self._url}/{name}"

    def exists(self) -> bool:
        """Whether the store knows of the folder; many know only of files in it."""
        try:
            self._retried("", lambda system, path: within_patience(lambda: system.info(path)))
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        return self._retried("", self._linked if self._is_web else _listed)

    def _linked(self, system: Any, path: str) -> list[str]:
        page = self._read_whole(system, path, MOST_LISTING_BYTES)
        if len(page) > MOST_LISTING_BYTES:
            raise StorageError(
                f"{self._url}: its listing goes on after {MOST_LISTING_BYTES:,} bytes, so it is "
                "not that of a shard folder; check the server"
            )
        return linked_names(page, path)

    def size(self, name: str) -> int:

        def read(system: Any, path: str) -> int:
            size = _size(system, path)
            if size is None:
                raise OSError("the store does not tell its size")
            return size

        return self._retried(name, read)

    def read_bytes(self, name: str) -> bytes:

        def read(system: Any, path: str) -> bytes:
            stored, most = _size(system, path), most_bytes(name)
            check_size(self.path(name), stored or 0, most)
            if self._is_web or stored is None:
                contents = self._read_whole(system, path, most if stored is None else stored)
                check_size(self.path(name), len(contents), most)
            else:
                contents = within_patience(lambda: system.cat_file(path), stored)
            # Some servers hang up early without an error, others go on after what they declared.
            _check_arrived(len(contents), stored)
            return contents

        return self._retried(name, read)

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens the local copy of a shard; it is downloaded where there is none.

        Raises:
            FileNotFoundError: no such file.
            DamagedDataError: the store has other bytes than those that were written.
            InputError: data.cache_dir is not set or cannot be used.
            StorageError: the store does not answer, or the disk is full.
        """
        if self._cache is None:
            raise InputError(
                f"data.cache_dir = None, must be set to read shards from {self._url}; name a "
                "folder on a local disk",
                key="data.cache_dir",
            )
        return self._cache.open(name, size, sha256, lambda: self._chunks(name, size))

    def distrust(self, name: str) -> bool:
        """Removes the copy of a shard, so that it is downloaded again; whether there was one."""
        return self._cache is not None and self._cache.forget(name)

    def _retried(self, name: str, read: Callable[[Any, str], Result]) -> Result:
        def attempt() -> Result:
            with self._connected(name) as (system, path):
                return read(system, path)

        path = self.path(name) if name else self._url
        return with_retries(attempt, path, self._options, transient=(Exception,))

    def _chunks(self, name: str, size: int) -> Generator[bytes]:
        """Yields the bytes of a file; fails where fewer arrive than the store has."""
        arrived = 0
        with self._connected(name) as (system, path):
            with contextlib.closing(self._stream(system, path)) as stream:
                for chunk in stream:
                    arrived += len(chunk)
                    yield chunk
            if arrived < size:
                _check_arrived(arrived, _size(system, path))

    def _read_whole(self, system: Any, path: str, most: int) -> bytes:
        """Returns the bytes of a file; of a longer one a few more than `most`."""
        contents = bytearray()
        with contextlib.closing(self._stream(system, path)) as stream:
            for chunk in stream:
                contents += chunk
                if len(contents) > most:
                    break
        return bytes(contents)

    def _stream(self, system: Any, path: str) -> Generator[bytes]:
        """Yields the bytes of a file as they come; fails where they come too slowly."""
        options: dict[str, Any] = {"cache_type": "none"}
        if self._is_web:
            options["block_size"] = 0  # one request: not every web server knows ranges
        file = within_patience(lambda: system.open(path, "rb", **options))

        def read() -> bytes:
            contents: bytes = file.read(CHUNK_BYTES)
            return contents

        # the web returns what has come, or fails after a silence; others when a chunk is complete
        attempt = read if self._is_web else lambda: within_patience(read, CHUNK_BYTES)
        pace = Pace()
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            try:
                while chunk := pace.next(attempt):
                    yield chunk
            except GaveUpError:
                stack.pop_all()  # to close it would wait for the read
                raise

    @contextlib.contextmanager
    def _connected(self, name: str) -> Iterator[tuple[Any, str]]:
        """Yields the file system and the path there of a file, with one meaning per exception."""
        # fsspec keeps one instance per process, and per thread where it is not safe for several.
        system = None
        try:
            system, folder = url_to_fs(self._url, use_listings_cache=False, **self._settings)
            # A listing kept from before would hide a file that has just come.
            system.invalidate_cache()
            yield system, f"{folder.rstrip('/')}/{name}" if name else folder
        except Exception as error:
            meaning = _meaning(error)
            if meaning is not FileNotFoundError and system is not None:
                system.clear_instance_cache()  # the next attempt connects anew
            path = self.path(name) if name else self._url
            # A server that does not answer, told as a missing file: as such it would never be tried
            # again.
            if meaning is None and isinstance(error, FileNotFoundError):
                cause = error.__cause__
                raise OSError(f"{type(cause).__name__}: {cause}") from error
            if meaning is None or isinstance(error, meaning):
                raise
            raise meaning(path) from error


def _known_protocols(url: str) -> list[str]:
    """Returns the protocols of a URL, of which several may be chained by "::".

    Raises:
        InputError: fsspec does not know one of them, or lacks a package for it.
    """
    protocols = [split_protocol(part)[0] or part for part in url.split("::")]
    for protocol in protocols:
        try:
            get_filesystem_class(protocol)
        except ValueError as error:
            raise InputError(
                f"{url}: fsspec {fsspec.__version__} knows no {protocol}:// URLs; name a folder, "
                "or a URL such as s3://BUCKET/FOLDER"
            ) from error
        except ImportError as error:
            raise InputError(
                f"{url}: a package for {protocol}:// URLs is missing ({error}: "
                f"{error.__cause__}); run `pip install 'megadlcm[remote]'`, or install that package"
            ) from error
    return protocols


def _web_settings() -> dict[str, Any]:
    """Returns settings by which a slow download may take its time, and a silent one ends."""
    from aiohttp import ClientTimeout  # fsspec has just imported it

    # By itself aiohttp ends every download after five minutes, however well it goes on.
    timeout = ClientTimeout(total=None, sock_connect=PATIENCE_SECONDS, sock_read=PATIENCE_SECONDS)
    # trusted: passwords come from ~/.netrc, and proxies from the environment
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _size(system: Any, path: str) -> int | None:
    size: int | None = within_patience(lambda: system.info(path)["size"])
    return size


def _listed(system: Any, path: str) -> list[str]:
    entries = within_patience(lambda: system.ls(path, detail=True), LISTING_BYTES)
    return sorted(
        {entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory"}
    )


def _check_arrived(arrived: int, stored: int | None) -> None:
    if stored is not None and arrived != stored:
        raise OSError(f"{arrived} of {stored} bytes arrived")


def _meaning(error: BaseException) -> type[OSError] | None:
    """Returns what a store says by an exception; None: it has failed and may work later.

    File systems differ: some raise errors of their own that bear a status of HTTP, and fsspec's
    own for the web calls a file missing whenever its server does not answer.
    """
    for kind in (PermissionError, IsADirectoryError, NotADirectoryError):
        if isinstance(error, kind):
            return kind
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        return (
            FileNotFoundError
            if cause is None or isinstance(cause, LookupError)
            else _meaning(cause)
        )
    status = _status(error)
    if status in _NOT_FOUND:
        return FileNotFoundError
    return PermissionError if status in _DENIED else None


def _status(error: BaseException) -> object:
    """Returns the status of HTTP that an exception bears, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # Each library bears it under another name, on the exception or on its response.
    for bearer in (error, response):
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(bearer, name, None), int):
                return status
    return None
