"""Saves that are killed at any moment leave whole checkpoints and nothing that looks like one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.checkpoint_kills import kill_saves
from megadlcm.checkpoint import storage
from megadlcm.checkpoint.storage import LocalStorage


def test_nothing_is_lost_whenever_a_save_is_killed(tmp_path: Path) -> None:
    found = kill_saves(tmp_path / "saves", 60, random.Random(0))
    assert found["kills"] == 60 and found["steps"] > 0
    # not vacuous: kills came in the middle of saves
    assert sum(count for state, count in found["left behind"].items() if state != "nothing") > 10


def test_a_protocol_without_its_last_step_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one that writes in the place where readers look."""

    def in_place(self: LocalStorage, name: str, attempt: str) -> Path:
        return self.root / name

    monkeypatch.setattr(storage.LocalStorage, "_building", in_place)
    monkeypatch.setattr(Path, "rename", lambda *_: None)
    with pytest.raises(AssertionError, match="after a kill"):
        kill_saves(tmp_path / "saves", 200, random.Random(0))
