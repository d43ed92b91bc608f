"""What a reading process keeps at hand, and how much of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

KEPT_SHARDS = 32
"""Shards whose documents are kept at hand: those that one shuffle block touches, and some more."""


class LeastRecent(Generic[Key, Value]):
    """Keeps the last `capacity` values it was asked for; making one again must change nothing.

    For any number of threads: two of them may make the same value, one of which is kept.
    """

    def __init__(self, capacity: int) -> None:
        self._values: dict[Key, Value] = {}
        self._capacity = capacity
        self._lock = threading.Lock()

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """Returns the value of the key, made where it is not kept."""
        with self._lock:
            if key in self._values:
                value = self._values.pop(key)
                self._values[key] = value  # reinserted last: dicts keep insertion order
                return value
        made = make()  # outside the lock: it may read a file
        with self._lock:
            value = self._values.pop(key, made)
            self._values[key] = value
            if len(self._values) > self._capacity:
                self._values.pop(next(iter(self._values)))
        return value

    def forget(self, key: Key) -> None:
        with self._lock:
            self._values.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
