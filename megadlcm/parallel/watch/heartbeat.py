"""What processes show of themselves, and the board in the store of the run on which they do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

_Answer = TypeVar("_Answer")

_FAILED = "heartbeat/failed"
_NUM_LEFT = "heartbeat/left"
_LOST_AFTER = 3
"""Questions in a row that the store's connection refuses, after which its host is gone."""


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Reads a value, waiting for it."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Adds to a number that begins at 0; the sum."""
        ...


@dataclass(frozen=True)
class Heartbeat:
    """One process as the board shows it."""

    rank: int
    host: str
    pid: int
    count: int
    """Heartbeats of this process until now: one that does not grow has stopped."""
    place: str
    waits_for: str | None
    failure: str | None
    left: bool
    """Whether it ended in order, or because of another process."""
    terminated: bool = False
    """Whether it left because it was told to (SIGTERM)."""

    @property
    def is_ending(self) -> bool:
        """Whether it knows what it needs from the board."""
        return self.left or self.failure is not None

    @property
    def who(self) -> str:
        """Rank, host and pid."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Its place and phase."""
        return f"{self.place}, {self.waits_for or 'computing'}"


class Board:
    """The heartbeats of all processes; never raises, and never waits longer than `patience`.

    Args:
        store: a connection of its own to the store of the run.
        world_size: processes of the run.
        patience: seconds after which the store counts as silent.
    """

    def __init__(self, store: Store, world_size: int, patience: float) -> None:
        self.store, self.world_size, self.patience = store, world_size, patience
        self._unanswered: threading.Thread | None = None
        self._refused = 0

    @property
    def is_silent(self) -> bool:
        """Whether the store has not answered the last question until now."""
        return self._unanswered is not None and self._unanswered.is_alive()

    @property
    def is_gone(self) -> bool:
        """Whether its host has closed the connection, which nothing opens again."""
        return self._refused >= _LOST_AFTER

    def show(self, heartbeat: Heartbeat) -> None:
        """Writes the last heartbeat of a process."""
        text = json.dumps(heartbeat.__dict__)
        self._ask(lambda: self.store.set(_key(heartbeat.rank), text))

    def show_failure(self, rank: int) -> None:
        """Writes that there is a failure, which others can see without reading all heartbeats."""
        self._ask(lambda: self.store.set(_FAILED, str(rank)))

    def show_leaving(self) -> None:
        """Counts this process among those that leave; once."""
        self._ask(lambda: self.store.add(_NUM_LEFT, 1))

    def all_leave(self) -> bool:
        """Whether every process does, this one included; one question for any number of them."""
        return (self._ask(lambda: self.store.add(_NUM_LEFT, 0)) or 0) >= self.world_size

    def has_failure(self) -> bool:
        """Whether some process showed one."""
        return bool(self._ask(lambda: self.store.check([_FAILED])))

    def read(self, ranks: Iterable[int] | None = None) -> dict[int, Heartbeat] | None:
        """The last heartbeats of these processes, or of all, as far as they have shown one.

        None where the store does not answer.
        """
        wanted = list(range(self.world_size) if ranks is None else ranks)
        return self._ask(lambda: self._read(wanted))

    def _read(self, ranks: list[int]) -> dict[int, Heartbeat]:
        heartbeats = {}
        for rank in ranks:
            # `get` would wait for a process that never came
            if self.store.check([_key(rank)]):
                heartbeats[rank] = Heartbeat(**json.loads(self.store.get(_key(rank))))
        return heartbeats

    def _ask(self, ask: Callable[[], _Answer]) -> _Answer | None:
        """Asks the store; None where it does not answer.

        A store whose host is stopped never answers, whatever its timeout, and keeps the asking
        thread: so that is a thread of its own, and there is no second one until it is back.
        """
        if self.is_silent:  # asking again would leave one hanging thread at every heartbeat
            return None
        answers: list[_Answer] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                answers.append(ask())
            except Exception as error:  # the host is gone: no answer either
                errors.append(error)

        thread = threading.Thread(target=run, name="heartbeat board", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # at its end Python 3.12 starts none, and nobody waits for it now
            return None
        thread.join(timeout=self.patience)
        # a late answer is dropped, but ends the silence
        self._unanswered = thread if thread.is_alive() else None
        self._refused = self._refused + 1 if errors else 0
        return answers[0] if answers else None


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
