"""What progress says of the time left, on a clock of its own."""

from __future__ import annotations

import time

import pytest

from data_pipeline.progress import Progress


@pytest.mark.parametrize(
    ("earlier", "said"),
    [(0, "prepare: 50%, 900 tokens, 30 tokens/s, 30 s, 30 s left"), (50, "30 s, 180 s left")],
)
def test_the_time_left_counts_only_what_was_done_since_the_start(
    earlier: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 of 120 after 30 s: as much again, or six times as much where 50 lay there already."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("prepare", 120, "tokens", earlier) as progress:
        now[0] = 30.0
        progress.update(60, 900)
        assert capsys.readouterr().err.endswith(f"{said}\n")
        now[0] = 60.0
        progress.update(120, 1800)
    assert capsys.readouterr().err == "prepare: 100%, 1,800 tokens, 30 tokens/s, 60 s\n" * 2
