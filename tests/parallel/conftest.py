"""The small run of the config tests."""

from __future__ import annotations

from tests.config.conftest import run_file

__all__ = ["run_file"]
