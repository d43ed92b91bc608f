"""What one process says of the others, on a board in this process and by a clock of its own."""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megadlcm.parallel.watch import watchdog as watchdog_module
from megadlcm.parallel.watch.activity import Activity, doing
from megadlcm.parallel.watch.watchdog import Watchdog
from tests.support.watched_run import INTERVAL, LONG, TIMEOUT, Ended, Run, said


@pytest.fixture
def run() -> Run:
    return Run()


def test_only_the_silent_rank_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _, mine, silent = run.watchdogs
    silent.send_heartbeat()
    run.lives(0)
    waited = run.waits_for_ever(mine, "tensor parallel all-reduce")
    assert TIMEOUT < waited <= 2 * TIMEOUT
    line = said(capsys)
    assert line.startswith("error: step 7: rank 1 (") and "in tensor parallel all-reduce" in line
    assert f"longer than parallel.collective_timeout_seconds = {TIMEOUT:g}" in line
    assert "rank 2 (" in line and "sends no heartbeat" in line
    assert "rank 0 (" not in line
    assert run.shown(1).left


def test_a_rank_that_never_came_is_named(run: Run) -> None:
    run.lives(0)
    found = run.watchdogs[1].look_around()
    assert found.is_certain and found.silent == (2,)
    assert found.text == "rank 2 never sent a heartbeat"


def test_computing_and_short_waits_are_no_reason_to_end(run: Run) -> None:
    mine = run.watchdogs[1]
    run.lives(0, 2)
    run.watch(mine, LONG)  # a long step, an evaluation, a checkpoint
    for _ in range(20):
        with doing("barrier", activity=run.activities[1]):
            run.watch(mine, TIMEOUT / 5)
    run.waits_for_ever(mine, "barrier")  # the same time in one piece: the watch does run


def test_those_who_come_late_are_not_accused(run: Run) -> None:
    """The wait is over while the board is being read."""
    mine = run.watchdogs[1]
    began = run.clock.now()

    def come() -> None:
        if run.clock.now() == began + TIMEOUT + 2 * INTERVAL:
            run.activities[1].arrive("step 8")

    run.clock.others = [come]
    with doing("barrier", activity=run.activities[1]):
        run.watch(mine, TIMEOUT + 2 * INTERVAL)
    assert run.activities[1].place == "step 8"
    assert not run.shown(1).left


def test_a_failure_elsewhere_ends_a_wait_before_its_timeout(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, failing = run.watchdog(1, 100 * TIMEOUT), run.watchdogs[2]
    failing.publish_failure("shard-000000.tar: damaged")
    assert run.waits_for_ever(mine, "pipeline receive") < 3 * mine.interval
    line = said(capsys)
    assert "rank 2 (" in line and "failed: shard-000000.tar: damaged" in line
    assert "collective_timeout_seconds" not in line


def test_an_error_of_ones_own_in_a_collective_is_told_to_the_others(run: Run) -> None:
    """Out of memory in a backward pass looks like a broken connection until the board is read."""
    run.lives(0, 2)
    text = run.breaks_in(run.watchdogs[1], "backward pass")
    assert "no process is missing" in text
    failure = run.shown(1).failure
    assert failure is not None and "out of memory" in failure and "backward pass" in failure


def test_the_error_of_a_broken_connection_names_who_is_gone(run: Run) -> None:
    living, mine, dead = run.watchdogs
    dead.send_heartbeat()
    run.lives(0)
    text = run.breaks_in(mine, "data parallel all-reduce")
    assert "lost its connection in data parallel all-reduce; rank 2 (" in text
    assert run.shown(1).failure is None and run.shown(1).left
    # whoever left because of another is not accused by the next
    found = living.look_around()
    assert found.silent == (2,) and "rank 1 (" not in found.text


def test_a_slow_backward_pass_is_no_reason_to_end_while_the_others_live(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = run.watchdogs[1]
    run.lives(0, 2)
    with doing("backward pass", computes=True, activity=run.activities[1]):
        run.watch(mine, LONG)
        run.lives(0)  # and now one of them stops
        with pytest.raises(Ended):
            run.watch(mine, LONG)
    line = said(capsys)
    assert "has been" in line and "in backward pass" in line
    assert "; rank 2 (" in line and "sends no heartbeat" in line


def test_only_after_the_first_step_those_who_live_must_come_in_time(run: Run) -> None:
    run.activities[1] = Activity(run.clock)
    mine = run.watchdog(1)
    run.lives(0, 2)
    for place in ("step 1", "step 2"):
        with doing("broadcast", activity=run.activities[1]):
            run.watch(mine, LONG)
        run.activities[1].arrive(place)
    run.waits_for_ever(mine, "broadcast")


def test_a_wait_among_the_living_says_where_they_are(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.lives(0, 2)
    run.activities[2].arrive("evaluation after step 7")
    with doing("barrier", activity=run.activities[0]):
        run.waits_for_ever(run.watchdogs[1], "barrier")
    line = said(capsys)
    assert "is alive in evaluation after step 7, computing" in line
    assert "rank 0 (" not in line  # it waits for the same


def test_who_ended_in_order_is_not_missed(run: Run) -> None:
    """The last one may write for longer than the timeout after the others are done."""
    for other in (0, 2):
        run.watchdogs[other].send_heartbeat()
        run.watchdogs[other].stop()
    run.watch(run.watchdogs[1], LONG)
    assert not run.watchdogs[1].look_around().is_certain


def test_ones_own_error_is_not_hidden_by_others_that_are_elsewhere(run: Run) -> None:
    """They wait for this process in some collective: that is not why it failed."""
    run.lives(0, 2)
    for other in (0, 2):
        doing("data parallel all-reduce", activity=run.activities[other]).__enter__()
    assert "out of memory" in run.breaks_in(run.watchdogs[1], "backward pass")
    failure = run.shown(1).failure
    assert failure is not None and "out of memory" in failure


def test_who_looks_for_the_silent_is_not_silent_itself(run: Run) -> None:
    """All of them look at the same time, because they waited for the same one."""
    mine = run.watchdogs[1]
    mine.send_heartbeat()
    before = run.shown(1).count
    mine.look_around()
    assert run.shown(1).count >= before + 3


def test_who_holds_the_board_keeps_it_until_the_others_know(run: Run) -> None:
    host = run.watchdogs[0]
    run.lives(1, 2)
    leaving = run.clock.now() + 4 * INTERVAL

    def leave() -> None:
        if run.clock.now() == leaving:
            for other in (1, 2):
                run.watchdogs[other].stop()

    run.clock.others.append(leave)
    host.publish_failure("disk full")
    assert run.clock.now() == leaving + INTERVAL
    began = run.clock.now()
    run.watchdogs[2].publish_failure("it is not its host")
    assert run.clock.now() == began


def test_a_closed_stderr_does_not_keep_a_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    run.waits_for_ever(run.watchdogs[1], "barrier")


def test_the_place_is_on_the_board(run: Run) -> None:
    run.activities[1].arrive("evaluation after step 40")
    with doing("run all-gather", activity=run.activities[1]):
        run.watchdogs[1].send_heartbeat()
    assert run.shown(1).doing == "evaluation after step 40, run all-gather"


def test_the_thread_does_so_by_the_clock_of_the_machine() -> None:
    """Everything above, but for time: a started watch sends, watches and ends by itself."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    ended = threading.Event()
    activity = Activity()
    watchdog = Watchdog(
        store, 1, 2, timeout_seconds=0.25, activity=activity, end=lambda _: ended.set()
    )
    watchdog.start()
    with doing("barrier", activity=activity):
        started = time.monotonic()
        assert ended.wait(60.0)
        assert time.monotonic() - started > 0.25
    watchdog.stop()
    assert [thread.name for thread in threading.enumerate() if thread.name == "watchdog"] == []


@pytest.mark.parametrize(
    ("error", "is_explained"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (dist.DistBackendError("remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("a value that speaks of NCCL"), False),
    ],
)
def test_a_collective_that_a_library_runs_on_its_own_account_is_explained_too(
    run: Run, error: Exception, is_explained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has entered it under a name: DeepSpeed's own gathers, say."""
    mine = run.watchdogs[1]
    for watchdog in run.watchdogs:
        watchdog.send_heartbeat()
    run.lives(0)
    monkeypatch.setattr(watchdog_module, "_watchdog", mine)
    text = watchdog_module.report_failure(error)
    if is_explained:
        assert text is not None and "; rank 2 (" in text and "sends no heartbeat" in text
        assert run.shown(1).failure is None
    else:
        assert text is None
        assert run.shown(1).failure is not None
