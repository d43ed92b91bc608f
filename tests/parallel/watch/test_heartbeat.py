"""The board of heartbeats, and a store that does not answer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megadlcm.parallel.watch.heartbeat import Board, Heartbeat


def heartbeat(rank: int, count: int) -> Heartbeat:
    return Heartbeat(rank, "host", 17, count, "step 7", None, None, False)


def memory() -> Any:
    """A store of this process."""
    return dist.HashStore()  # type: ignore[attr-defined]


def test_what_is_shown_is_read_by_all() -> None:
    store = memory()
    first, second = Board(store, 3, 60.0), Board(store, 3, 60.0)
    first.show(heartbeat(0, 4))
    first.show(heartbeat(2, 1))
    first.show(heartbeat(2, 2))
    assert second.read() == {0: heartbeat(0, 4), 2: heartbeat(2, 2)}
    assert second.read([2]) == {2: heartbeat(2, 2)}
    assert not second.has_failure()
    first.show_failure(2)
    assert second.has_failure()


def test_a_board_that_answers_late_is_used_again() -> None:
    """The host of the store was suspended for a while."""
    store, answers = memory(), threading.Event()

    class Late:
        def set(self, key: str, value: str) -> None:
            answers.wait()
            store.set(key, value)

        def get(self, key: str) -> bytes:
            value: bytes = store.get(key)
            return value

        def check(self, keys: list[str]) -> bool:
            return bool(store.check(keys))

    board = Board(Late(), 2, patience=0.1)
    board.show(heartbeat(1, 1))
    assert board.is_silent
    assert board.read() is None  # it is not asked a second time before it has answered
    assert Board(store, 2, 60.0).read() == {}
    answers.set()
    deadline = time.monotonic() + 60.0
    while board.is_silent and time.monotonic() < deadline:
        time.sleep(0.01)
    board.show(heartbeat(1, 2))
    assert board.read() == {1: heartbeat(1, 2)}


def test_a_store_that_raises_is_a_board_that_does_not_answer() -> None:
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("closed")

        def get(self, key: str) -> bytes:
            raise RuntimeError("closed")

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("closed")

    board = Board(Broken(), 2, 60.0)
    board.show(heartbeat(1, 1))
    assert board.read() is None and not board.has_failure() and not board.is_silent


def test_an_interpreter_that_ends_and_starts_no_thread_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python 3.12 refuses threads to functions that run at its end, such as the one that leaves."""
    board = Board(memory(), 2, 60.0)
    board.show(heartbeat(1, 1))

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        board.show(heartbeat(1, 2))
        assert board.read() is None and not board.is_silent
    assert board.read() == {1: heartbeat(1, 1)}
