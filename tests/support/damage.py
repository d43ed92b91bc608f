"""Files that are not as they were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.shard_format.index import _header_digest


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the entries of an index as a wrong writer would: with a digest that fits."""
    path = folder / "index.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    del contents["index_sha256"]
    change(contents)
    contents["index_sha256"] = _header_digest(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


def flip(path: Path, offset: int) -> None:
    """Changes one byte of a file."""
    contents = bytearray(path.read_bytes())
    contents[offset] ^= 0x20
    path.write_bytes(contents)


def flip_bit(path: Path, offset: int = -1) -> None:
    """Changes the lowest bit of one byte, in place."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(offset % size)
        byte = file.read(1)[0]
        file.seek(offset % size)
        file.write(bytes([byte ^ 1]))
