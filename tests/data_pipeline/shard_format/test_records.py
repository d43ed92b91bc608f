"""Document tables are read by many threads at once."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import numpy as np
import pytest

from data_pipeline.shard_format import records


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
            found.append(records.load_array(io.BytesIO(stored.getvalue())).tolist())

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 1, 2]] * 20 and most == 1
