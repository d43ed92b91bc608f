"""Placeholder API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what this process waits for."""
    yield
