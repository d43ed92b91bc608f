from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any

import pytest

from data_pipeline.errors import StorageError
from megadlcm.training import progress
from megadlcm.training.progress import ProgressReport


def row(step: int, **entries: Any) -> dict[str, Any]:
    numbers = {"step": step, "loss": 2.34567, "tokens_per_second": 12345.6}
    return numbers | {"tokens_per_concept": 4.031} | entries


def test_a_log_file_has_every_step_and_the_screen_the_first_and_the_last(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 1e9)
    report = ProgressReport(first_step=10, train_steps=14, enabled=True)
    with caplog.at_level(logging.INFO):
        for step in range(11, 15):
            report.show(row(step))
    report.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["11/14", "14/14"]
    assert "loss 2.3457  ratio 4.03  12,346 tokens/s  ETA 0:00:00" in printed[-1]
    assert [message.split()[1] for message in caplog.messages] == [f"{n}/14" for n in range(11, 15)]


def test_lines_come_as_often_as_their_distance_allows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    report = ProgressReport(first_step=0, train_steps=5, enabled=True)
    for step in range(1, 6):
        report.show(row(step))
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_other_ranks_are_silent_but_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    report = ProgressReport(first_step=0, train_steps=1, enabled=False)
    with caplog.at_level(logging.INFO):
        report.say("hello")
        report.show(row(1))
    report.close()
    assert capsys.readouterr() == ("", "") and len(caplog.messages) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_output_that_is_gone_is_no_full_run_folder(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """EIO is what a terminal says that was closed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    report = ProgressReport(first_step=0, train_steps=1, enabled=True)
    monkeypatch.setattr("builtins.print", fail)
    with pytest.raises(StorageError, match=r"^the output cannot be written \("):
        report.say("hello")


def test_a_model_without_concepts_shows_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    report = ProgressReport(first_step=0, train_steps=1, enabled=True)
    dense = {key: value for key, value in row(1).items() if key != "tokens_per_concept"}
    report.show(dense)
    assert "ratio" not in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_no_lines_of_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = ProgressReport(first_step=2, train_steps=4, enabled=True)
    report.show(row(3))
    line = "step 3: held-out loss 2.1, run folder [/runs/one] " + 20 * "so wide "
    report.say(line)  # as it is: brackets are no markup, and the terminal breaks lines
    report.show(row(4))
    report.close()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert line.rstrip() in printed.err and "4/4" in printed.err
