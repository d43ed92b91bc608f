"""Processes that are told to end, and those whose launcher is gone."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megadlcm.parallel.process_group import abandon_process_group
from megadlcm.parallel.watch.activity import THIS_PROCESS, doing
from megadlcm.parallel.watch.watchdog import EXIT_CODE, EXIT_CODE_OF_SIGTERM, Watchdog
from tests.support.watched_run import INTERVAL, TIMEOUT, Ended, Run, said


@pytest.fixture
def run() -> Run:
    return Run()


def told_to_end(watchdog: Watchdog) -> None:
    with pytest.raises(Ended, match=f"^{EXIT_CODE_OF_SIGTERM}$"):
        watchdog.leave_on_request()


def test_who_is_told_to_end_names_the_one_that_the_launcher_lost(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks 0 and 1 are told within a moment of each other; rank 2 was killed in step 7."""
    first, second, killed = run.watchdogs
    for watchdog in run.watchdogs:
        watchdog.send_heartbeat()
    run.clock.others = [lambda: told_to_end(first) if not run.shown(0).left else None]
    with doing("data parallel all-reduce", activity=run.activities[1]):
        told_to_end(second)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "was told to end (SIGTERM)" in line
        accused = line.partition("; ")[2]
        assert accused.startswith("rank 2 (") and "last seen in step 7, computing" in accused
        assert "rank 0 (" not in accused and "rank 1 (" not in accused
    # the next one to look accuses nobody else either
    assert run.watchdogs[0].look_around().silent == (2,)
    assert killed.rank == 2


def test_when_all_are_told_to_end_nobody_waits_and_nobody_is_accused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is cancelled."""
    for watchdog in run.watchdogs:
        watchdog.send_heartbeat()
    for watchdog in run.watchdogs:
        watchdog._terminated = True
        watchdog._leave()
    for watchdog in run.watchdogs:
        began = run.clock.now()
        told_to_end(watchdog)
        # rank 0 holds the board, which others may be reading
        assert run.clock.now() == began + (0 if watchdog.rank else INTERVAL)
        line = said(capsys)
        assert line.startswith(f"error: step 7: rank {watchdog.rank} (")
        assert line.endswith("(SIGTERM) in computing")


def test_one_that_alone_was_told_to_end_is_named_by_the_others(run: Run) -> None:
    run.lives(0, 2)
    run.activities[1].arrive("step 8")
    told_to_end(run.watchdogs[1])
    text = run.breaks_in(run.watchdogs[0], "data parallel all-reduce")
    assert "; rank 1 (" in text and "was told to end (SIGTERM) in step 8, computing" in text


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("comes_to_its_end", [True, False])
def test_who_is_about_to_say_why_a_collective_broke_is_not_ended_before(
    run: Run, when: str, comes_to_its_end: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have broken in a thread of its own, as backward passes on GPUs have."""
    mine, activity = run.watchdogs[1], run.activities[1]
    mine.send_heartbeat()

    def break_elsewhere() -> None:
        thread = threading.Thread(target=activity.breaks_in, args=("backward pass",))
        thread.start()
        thread.join()

    def come_to_its_end() -> None:
        if comes_to_its_end and run.clock.now() - began > 4 * INTERVAL:
            mine._stopped.set()

    began = run.clock.now()
    if when == "before":
        break_elsewhere()
        run.clock.others = [come_to_its_end]
    else:
        run.clock.others = [break_elsewhere, come_to_its_end]
    if comes_to_its_end:
        mine.leave_on_request()
        assert capsys.readouterr().err == ""
    else:  # it hangs, or the error was handled long ago
        told_to_end(mine)
        assert 4 * INTERVAL < run.clock.now() - began < 7 * INTERVAL
        assert "was told to end (SIGTERM)" in said(capsys)


def closed(*_: object) -> None:
    """What a store does whose host is gone."""
    raise ConnectionError


CLOSED = type("Closed", (), dict.fromkeys(("set", "get", "check", "add"), closed))


def test_rank_0_keeps_its_board_until_the_others_have_looked(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told first, while rank 2 is lost: without it rank 1 would blame rank 0, or nobody."""
    first, second, _ = run.watchdogs
    for watchdog in run.watchdogs:
        watchdog.send_heartbeat()
    looks: list[bool] = []
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 1:
            second._terminated = True
            second._leave()
        if ticks == 4:  # three heartbeats after its first look
            looks.append(second.board.read() is not None)

    run.clock.others = [tick]
    told_to_end(first)
    assert looks == [True]
    assert "rank 2 (" in said(capsys)


@pytest.mark.parametrize("lost_during", ["look", "beat"])
def test_a_board_that_went_with_a_rank_0_that_was_told_to_end_accuses_nobody(
    run: Run, lost_during: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, host = run.watchdogs[1], run.watchdogs[0]
    for watchdog in run.watchdogs:
        watchdog.send_heartbeat()
    mine.beat()
    host._terminated = True
    host._leave()

    def lose() -> None:
        mine.board.store = CLOSED()

    if lost_during == "beat":
        mine.beat()
        lose()
    run.clock.others = [lose]
    text = mine.look_around().text
    assert text.startswith("rank 0 (") and "was told to end (SIGTERM) in step 7" in text
    told_to_end(mine)
    assert "rank 0" not in said(capsys)
    # the control: of one that nobody told to end it is said that it is gone
    host._terminated = False
    mine.board.store = run.store
    host.send_heartbeat()
    mine.beat()
    run.clock.others = [lose]
    assert "is gone: it holds the board" in mine.look_around().text


def test_a_launcher_that_is_gone_is_an_event_whatever_the_process_does(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers would train on as orphans: they have another parent, or lose its store."""

    def worker(store: object, hosted: bool, child: bool) -> Watchdog:
        def end(code: int) -> None:
            raise Ended(code)

        return Watchdog(store, 1, 3, TIMEOUT, hosted, child, run.activities[1], end)

    run.lives(0, 2)
    # torchrun keeps the store, or leaves it to rank 0
    children = [worker(run.store, hosted, True) for hosted in (False, True)]
    by_hand = worker(run.store, True, False)
    for watchdog in (*children, by_hand):
        run.watch(watchdog, 4 * TIMEOUT)  # as long as all is well
    lost_store = worker(CLOSED(), False, False)
    with pytest.raises(Ended, match=f"^{EXIT_CODE}$"):
        run.watch(lost_store, 3 * INTERVAL)
    line = said(capsys)
    assert line.startswith("error: step 7: rank 1 (") and "the launcher is gone" in line
    monkeypatch.setattr(os, "getppid", lambda: 1)
    for watchdog in children:
        with pytest.raises(Ended, match=f"^{EXIT_CODE}$"):
            run.watch(watchdog, 2 * INTERVAL)
        assert "the launcher is gone" in said(capsys)
    # a process that nobody watches over may outlive the shell that started it
    run.watch(by_hand, 4 * TIMEOUT)


def test_a_store_that_went_with_rank_0_ends_a_wait_before_its_timeout(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = run.watchdog(1, 100 * TIMEOUT)
    run.watchdogs[0].send_heartbeat()
    mine.beat()

    mine.board.store = CLOSED()
    run.watch(mine, 50 * INTERVAL)  # computing: whoever ended in order may be gone
    assert run.waits_for_ever(mine) < 10 * mine.interval
    assert "rank 0 (" in (line := said(capsys)) and "is gone" in line


@pytest.mark.parametrize("broke_in", [None, "backward pass"])
def test_only_who_is_about_to_say_why_outlives_another_request(
    broke_in: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(THIS_PROCESS, "broke_in", broke_in)
    abandon_process_group()
    ignored = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, handler)
    assert ignored == (broke_in is not None)
