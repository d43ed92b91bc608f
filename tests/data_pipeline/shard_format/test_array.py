"""Arrays are what numpy writes, and are read by many threads at once."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest

from data_pipeline.shard_format.array import array_header, load_array, save_array


def test_headers_of_arrays_are_parsed_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two at once can fail inside Python, and sound bytes would count as damaged."""
    stored = io.BytesIO()
    np.save(stored, np.arange(3))
    sound, inside, most = np.load, 0, 0

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        loaded = sound(*args, **options)
        inside -= 1
        return loaded

    monkeypatch.setattr(np, "load", slow)
    found: list[list[int]] = []
    ready = threading.Barrier(4)

    def load() -> None:
        ready.wait()
        for _ in range(5):
            found.append(load_array(io.BytesIO(stored.getvalue())).tolist())

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 1, 2]] * 20 and most == 1


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("length", [1, 7, 9, 10, 99, 1000, 123_456])
def test_a_header_and_the_items_are_what_numpy_saves(dtype: str, length: int) -> None:
    tokens = np.arange(length).astype(dtype)
    assert array_header(tokens.dtype.str, length) + tokens.tobytes() == save_array(tokens)
    assert array_header(tokens.dtype.str, length + 1) != array_header(tokens.dtype.str, length)


@pytest.mark.parametrize("contents", [b"", b"\x93NUMPY", save_array(np.arange(9))[:-1], b"x" * 200])
def test_what_is_no_array_is_refused(contents: bytes) -> None:
    with pytest.raises(ValueError, match="no array"):
        load_array(io.BytesIO(contents))
