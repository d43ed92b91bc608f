"""A server of S3 on this machine, and a look into what storages of checkpoints leave behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def object_server() -> Iterator[None]:
    """Runs one that s3:// URLs lead to, here and in processes started here; its bucket is empty."""
    server_module = pytest.importorskip(
        "moto.server", reason="moto is not installed; run `make install`"
    )
    pytest.importorskip("s3fs", reason="s3fs is not installed; run `make install`")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
            yield
            fsspec.filesystem("s3").clear_instance_cache()
    finally:
        server.stop()


class Place:
    """What lies in a folder or below a URL, seen from outside.

    Args:
        url: of it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.system, self._path = self._open()

    def _open(self) -> tuple[Any, str]:
        system, path = fsspec.url_to_fs(self.url, use_listings_cache=False)
        return system, path

    def listing(self) -> list[str]:
        """Names of all files."""
        found = self.system.find(self._path)
        return sorted(name.removeprefix(f"{self._path}/") for name in found)

    def uploads(self) -> list[str]:
        """Names of objects of which there are only parts."""
        bucket, _, key = self._path.partition("/")
        page = self.system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/")
        return [upload["Key"].removeprefix(f"{key}/") for upload in page.get("Uploads", ())]

    def get(self, key: str) -> bytes:
        content: bytes = self.system.cat_file(f"{self._path}/{key}")
        return content

    def put(self, key: str, content: bytes) -> None:
        self.system.pipe_file(f"{self._path}/{key}", content)

    def flip(self, key: str, position: int) -> None:
        """Changes one bit of a file."""
        content = bytearray(self.get(key))
        content[position] ^= 1
        self.put(key, bytes(content))
