"""Streams that go on too slowly, and calls that do not return."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any

import pytest

from data_pipeline.storage import patience
from data_pipeline.storage.patience import GaveUpError, Pace, within_patience
from tests.support.fake_clock import FakeClock


class Line:
    """Brings so many bytes at a time, each after so many seconds."""

    def __init__(self, num_bytes: int, seconds: int) -> None:
        self.clock = FakeClock()
        self.num_bytes, self.seconds = num_bytes, seconds
        self.pace = Pace(self.clock.now)

    def read(self, times: int) -> None:
        for _ in range(times):
            self.pace.next(self._read)

    def _read(self) -> bytes:
        self.clock.sleep(self.seconds)
        return bytes(self.num_bytes)


@pytest.mark.parametrize(
    ("num_bytes", "seconds"),
    [(64_000, 1), (64_000 * 45, 45), (8 * 2**20, 400), (2**20, 60), (0, 1000)],
    ids=["64 kB/s", "in gusts", "in large pieces", "just enough", "ended"],
)
def test_what_is_slow_and_comes_on_is_waited_for(num_bytes: int, seconds: int) -> None:
    Line(num_bytes, seconds).read(1000)


def test_a_byte_now_and_then_is_too_little() -> None:
    line = Line(1, seconds=5)
    with pytest.raises(OSError, match=r"^13 bytes in 65 s, too slow"):
        line.read(14)


def test_a_fast_beginning_buys_no_time() -> None:
    line = Line(100 * 2**20, seconds=1)
    line.read(1000)
    line.num_bytes, line.seconds = 1, 5
    began = line.clock.now()
    with pytest.raises(OSError, match="too slow"):
        line.read(100)
    assert line.clock.now() - began == 65


def test_the_time_that_the_reader_takes_is_its_own() -> None:
    line = Line(1, seconds=0)
    line.seconds = 1
    for _ in range(50):
        line.read(1)
        line.clock.sleep(1000)


def test_a_call_that_returns_is_what_it_was() -> None:
    assert within_patience(lambda: 7) == 7
    error = TimeoutError("the store's own")
    with pytest.raises(TimeoutError) as caught:
        within_patience(lambda: _raise(error))
    assert caught.value is error


def _raise(error: Exception) -> None:
    raise error


def test_a_call_that_does_not_return_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.01)
    returns = threading.Event()
    with pytest.raises(GaveUpError, match=r"^no answer in "):
        within_patience(returns.wait)
    returns.set()


def test_more_bytes_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def waits(futures: list[Future[None]], seconds: float) -> Any:
        waited.append(seconds)
        return wait(futures)

    monkeypatch.setattr(patience, "wait", waits)
    for num_bytes in (0, 5, 2**20, 8 * 2**20):
        within_patience(lambda: None, num_bytes)
    assert waited == [60, 60, 60, 480]
