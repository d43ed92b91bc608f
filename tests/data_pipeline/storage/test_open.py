"""The door: paths and URLs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_pipeline.storage.local import LocalFolder
from data_pipeline.storage.open import open_storage
from data_pipeline.storage.remote_folder import RemoteFolder


def test_a_location_is_a_path_or_a_url(tmp_path: Path) -> None:
    for location in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        folder = open_storage(location)
        assert isinstance(folder, LocalFolder) and folder.location == str(tmp_path)
    assert isinstance(open_storage("memory://shards"), RemoteFolder)


def test_paths_are_read_without_the_library_for_urls() -> None:
    program = (
        "import sys, data_pipeline.storage.open as f; f.open_storage('a'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"data_pipeline.storage.open" in done.stdout and b"fsspec" not in done.stdout
