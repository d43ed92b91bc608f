"""A small file may hold a large one: it is unpacked a piece at a time."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import zstandard

from data_pipeline.prepare.compression import plain_chunks


@pytest.mark.parametrize(("name", "most"), [("a.gz", 1 << 20), ("a.zst", 34 << 20)])
def test_no_more_is_unpacked_at_once_than_fits_into_memory(name: str, most: int) -> None:
    """zstd turns 6 kB into 200 MB; a call hands out all that its input holds."""
    contents = bytes(160 << 20)
    pack = {"a.gz": gzip.compress, "a.zst": zstandard.compress}[name]
    packed = pack(contents)
    assert len(packed) < 1 << 18
    sizes = [len(chunk) for chunk in plain_chunks(Path(name), io.BytesIO(packed), 1 << 20)]
    assert sum(sizes) == len(contents)
    assert max(sizes) <= most


def test_pieces_of_zstd_are_as_large_as_asked_for() -> None:
    """However little is unpacked at once: a piece for each kilobyte would cost too much."""
    text = b"".join(b"%d " % number for number in range(200_000))
    packed = io.BytesIO(zstandard.compress(text))
    chunks = list(plain_chunks(Path("a.zst"), packed, 1 << 16))
    assert b"".join(chunks) == text
    assert min(map(len, chunks[:-1])) >= 1 << 16
