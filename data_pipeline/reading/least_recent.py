"""What a reading process keeps at hand, and how much of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

KEPT_SHARDS = 32
"""Shards of a source whose documents are kept at hand, however many they are."""
KEPT_BYTES = 64 * 2**20
"""More are kept up to here: a shuffle block of small shards touches hundreds of them."""


class LeastRecent(Generic[Key, Value]):
    """Keeps the last values it was asked for; making one again must change nothing.

    For any number of threads: two of them may make the same value, one of which is kept.

    Args:
        capacity: values that are kept.
        max_bytes: more are kept as long as all of them have no more bytes than that.
        num_bytes: bytes of a value.
    """

    def __init__(
        self, capacity: int, max_bytes: int = 0, num_bytes: Callable[[Value], int] = lambda _: 1
    ) -> None:
        self._values: dict[Key, Value] = {}
        self._capacity, self._max_bytes, self._num_bytes = capacity, max_bytes, num_bytes
        self._bytes = 0
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
            if key not in self._values:
                self._bytes += self._num_bytes(made)
            value = self._values.pop(key, made)
            self._values[key] = value
            while len(self._values) > self._capacity and self._bytes > self._max_bytes:
                self._drop(next(iter(self._values)))
        return value

    def forget(self, key: Key) -> None:
        with self._lock:
            if key in self._values:
                self._drop(key)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._bytes = 0

    def _drop(self, key: Key) -> None:
        self._bytes -= self._num_bytes(self._values.pop(key))
