"""Stores for tests: file systems of fsspec and a web server, whose faults are given to them."""

from __future__ import annotations

import importlib.util
import io
import urllib.request
from http.server import SimpleHTTPRequestHandler
from typing import Any, ClassVar

import fsspec
import pytest

without_aiohttp = pytest.mark.skipif(
    importlib.util.find_spec("aiohttp") is None,
    reason="http:// URLs need aiohttp; pip install aiohttp to run it",
)


class StatusError(Exception):
    """What some file systems raise: an exception of their own that bears a status of HTTP."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.status_code = status_code


class BotoError(Exception):
    """The form in which the library of S3 bears it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class FaultyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Files in memory, behind faults that are raised in turn and bytes that get lost."""

    protocol = "faulty"
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[Exception]] = []
    num_calls: ClassVar[int] = 0
    lost_bytes: ClassVar[list[int]] = []
    """Bytes that are missing at the end of each read to come."""

    @classmethod
    def fill(cls, **files: bytes) -> None:
        cls.files = {f"folder/{name}": contents for name, contents in files.items()}
        cls.faults, cls.lost_bytes, cls.num_calls = [], [], 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._fail()
        if path == "folder":
            return {"name": path, "size": 0, "type": "directory"}
        return {"name": path, "size": len(self._stored(path)), "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._fail()
        return [{"name": name, "size": None, "type": "file"} for name in self.files]

    def cat_file(self, path: str, **_: Any) -> bytes:
        self._fail()
        return self._arriving(path)

    def _open(self, path: str, **_: Any) -> io.BytesIO:
        self._fail()
        return io.BytesIO(self._arriving(path))

    def _arriving(self, path: str) -> bytes:
        stored = self._stored(path)
        return stored[: len(stored) - self.lost_bytes.pop(0)] if self.lost_bytes else stored

    def _stored(self, path: str) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def _fail(self) -> None:
        type(self).num_calls += 1
        if self.faults:
            raise self.faults.pop(0)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


class PlainWebFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """HTTP by the standard library, with its own exceptions; reads from the start only."""

    protocol = "plainweb"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        with self._request(path, "HEAD") as response:
            return {"name": path, "size": int(response.headers["Content-Length"]), "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        with self._request(path + "/", "GET") as response:
            links = response.read().decode().split('href="')[1:]
        files = [f"{path}/{link.partition(chr(34))[0]}" for link in links]
        return [{"name": name, "size": None, "type": "file"} for name in files]

    def cat_file(self, path: str, **_: Any) -> bytes:
        with self._request(path, "GET") as response:
            contents: bytes = response.read()
            return contents

    def _open(self, path: str, **_: Any) -> Any:
        return self._request(path, "GET")

    def _request(self, path: str, method: str) -> Any:
        request = urllib.request.Request(f"http://{path}", method=method)
        return urllib.request.urlopen(request, timeout=60)


fsspec.register_implementation("plainweb", PlainWebFileSystem, clobber=True)


class FlakyHandler(SimpleHTTPRequestHandler):
    """Serves a folder; refuses the next requests, or hangs up before the last byte."""

    refusals: ClassVar[list[int]] = []
    hang_ups: ClassVar[list[int]] = []

    def send_head(self) -> Any:
        if self.refusals:
            self.send_error(self.refusals.pop(0))
            return None
        return super().send_head()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        contents = source.read()
        if self.hang_ups:
            contents = contents[: -self.hang_ups.pop(0)]
        outputfile.write(contents)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""
