"""What a process shows of itself on the board of heartbeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Store(Protocol):
    """What is needed of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Writes a value."""
        ...

    def get(self, key: str) -> bytes:
        """Reads a value, waiting for it."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        ...


@dataclass(frozen=True)
class Sign:
    """One process as the board shows it."""

    rank: int
    host: str
    pid: int
    beat: int
    place: str
    waits_for: str | None
    failure: str | None
    left: bool
    """Whether it ended because of another process."""

    @property
    def key(self) -> str:
        """Where it is in the store."""
        return f"liveness/{self.rank}"

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
