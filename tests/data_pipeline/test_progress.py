"""What progress says of the time left, on a clock of its own."""

from __future__ import annotations

import sys
import time

import pytest

from data_pipeline import progress as progress_module
from data_pipeline.progress import LineLimit, Progress


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


def test_a_terminal_gets_a_bar_and_one_line_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    with Progress("prepare", 8, "tokens") as progress:
        for done in range(9):
            progress.update(done, 100 * done)
    bar, last = capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)
    assert "100%  800 tokens" in bar and "prepare: 100%" not in bar
    assert "prepare: 100%, 800 tokens" in last


def test_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that comes out of turn counts, too."""
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    at_once, later = LineLimit(10.0, at_once=True), LineLimit(10.0, at_once=False)
    assert at_once.allows() and not at_once.allows() and not later.allows()
    now[0] = 14.9
    assert not at_once.allows() and not later.allows() and later.allows(always=True)
    now[0] = 15.0
    assert at_once.allows() and not later.allows()
    now[0] = 25.0
    assert later.allows()
