"""A folder of an object store or of a web server, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.core import get_filesystem_class, split_protocol, url_to_fs

from data_pipeline.errors import InputError
from data_pipeline.storage.patience import PATIENCE_SECONDS

_NOT_FOUND = (404, 410)
_DENIED = (401, 403)


class Connection:
    """A folder behind a URL; connects when it is used, from any thread, also after a fork."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet.

        Raises:
            InputError: fsspec does not know the protocol, or lacks a package for it.
        """
        # A bare protocol is a root of its own; its slashes are no trailing ones.
        self.url = url if url.endswith("://") else url.rstrip("/")
        self.is_web = _known_protocols(url)[0] in ("http", "https")
        self._settings = _web_settings() if self.is_web else {}

    def __reduce__(self) -> tuple[type[Connection], tuple[str]]:
        """Goes to another process as its URL: connections do not travel."""
        return Connection, (self.url,)

    def path(self, name: str) -> str:
        """Returns what a file is called in messages; without a name, the folder."""
        return f"{self.url}/{name}" if name else self.url

    @contextlib.contextmanager
    def to(self, name: str) -> Iterator[tuple[Any, str]]:
        """Yields the file system and the path there of a file, with one meaning per exception."""
        # fsspec keeps one instance per process, and per thread where it is not safe for several.
        system = None
        try:
            system, folder = url_to_fs(self.url, use_listings_cache=False, **self._settings)
            # A listing kept from before would hide a file that has just come.
            system.invalidate_cache()
            yield system, f"{folder.rstrip('/')}/{name}" if name else folder
        except Exception as error:
            meaning = _meaning(error)
            if meaning is not FileNotFoundError and system is not None:
                system.clear_instance_cache()  # the next attempt connects anew
            # A server that does not answer, told as a missing file: as such it would never be tried
            # again.
            if meaning is None and isinstance(error, FileNotFoundError):
                cause = error.__cause__
                raise OSError(f"{type(cause).__name__}: {cause}") from error
            if meaning is None or isinstance(error, meaning):
                raise
            raise meaning(self.path(name)) from error


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
    status = status_of(error)
    if status in _NOT_FOUND:
        return FileNotFoundError
    return PermissionError if status in _DENIED else None


def status_of(error: BaseException) -> object:
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
