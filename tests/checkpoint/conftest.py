"""Places of checkpoints: a folder, and an object store on this machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_server import BUCKET, Place, object_server


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    with object_server():
        yield


@pytest.fixture
def bucket(server: None) -> str:
    """The URL of a place of the test's own."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/checkpoints"


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        (tmp_path / "checkpoints").mkdir()
        return Place(str(tmp_path / "checkpoints"))
    return Place(request.getfixturevalue("bucket"))
