"""What one process says of the others, on a board in this process."""

from __future__ import annotations

import io
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch.distributed as dist

from megadlcm.parallel.watch import watchdog as liveness
from megadlcm.parallel.watch.heartbeat import Sign, Store
from megadlcm.parallel.watch.watchdog import EXIT_CODE, Liveness, arrive, doing

INTERVAL = 0.05
TIMEOUT = 5 * INTERVAL
PATIENCE = 60.0
MakeWatch = Callable[..., Liveness]
ended: dict[Liveness, list[int]] = {}
"""Exit codes with which a watch would have ended its process."""


@pytest.fixture
def make_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWatch]:
    """Function(rank, **changes) -> the watch of a rank of 3 on one board, not started.

    Ranks of one process share what the process does now, which is enough for heartbeats.
    """
    monkeypatch.setattr(liveness, "_present", liveness._Present("step 7", places=9))
    handler = signal.getsignal(signal.SIGTERM)
    board = dist.HashStore()  # type: ignore[attr-defined]
    made: list[Liveness] = []

    def make(rank: int, timeout_seconds: float = TIMEOUT) -> Liveness:
        watch = Liveness(
            board, rank, 3, timeout_seconds, end=lambda code: ended[watch].append(code)
        )
        ended[watch] = []
        watch.interval = INTERVAL
        made.append(watch)
        return watch

    yield make
    for watch in made:
        if watch._thread.is_alive():
            watch.stop()
    signal.signal(signal.SIGTERM, handler)


def wait_for_end(watch: Liveness) -> None:
    """Stays in the present phase until the watch ends it."""
    deadline = time.monotonic() + PATIENCE
    while not ended[watch] and time.monotonic() < deadline:
        time.sleep(INTERVAL / 5)
    watch.stop()
    assert ended[watch][0] == EXIT_CODE


def show_once(watch: Liveness) -> None:
    """A process that showed itself, and then never again."""
    watch._publish()


def sign_of(watch: Liveness) -> Sign:
    """What the board shows of a rank."""
    return Sign(**json.loads(watch.store.get(f"liveness/{watch.rank}")))


def test_phases_nest_and_need_no_watch() -> None:
    with doing("outer"):
        outer = liveness._present.since
        with doing("inner", computes=True):
            assert (liveness._present.waits_for, liveness._present.computes) == ("inner", True)
        assert (liveness._present.waits_for, liveness._present.computes) == ("outer", False)
        assert liveness._present.since > outer  # what was inside is no part of the wait
    assert liveness._present.waits_for is None and liveness._present.computes


def test_only_the_silent_rank_is_named(
    make_watch: MakeWatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, living, silent = make_watch(1), make_watch(0, PATIENCE), make_watch(2)
    show_once(silent)
    living.start()
    mine.start()
    with doing("tensor parallel sum"):
        wait_for_end(mine)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("error: step 7: rank 1 (") and "in tensor parallel sum" in line
    assert "rank 2 (" in line and "no sign of life" in line
    assert "rank 0 (" not in line


def test_a_rank_that_never_came_is_named(make_watch: MakeWatch) -> None:
    mine, other = make_watch(1), make_watch(0)
    show_once(other)
    assert "rank 2 never gave a sign of life" in mine._find_missing().text


def test_computing_and_short_waits_are_no_reason_to_end(make_watch: MakeWatch) -> None:
    mine, *others = make_watch(1), make_watch(0, PATIENCE), make_watch(2, PATIENCE)
    for watch in [*others, mine]:
        watch.start()
    time.sleep(8 * TIMEOUT)  # a long step, an evaluation, a checkpoint
    for _ in range(20):
        with doing("sum"):
            time.sleep(TIMEOUT / 5)
    assert not ended[mine]
    with doing("sum"):  # the same time in one piece: the watch does run
        wait_for_end(mine)


def test_those_who_come_late_are_not_accused(make_watch: MakeWatch) -> None:
    """The wait is over while the board is being read."""
    mine = make_watch(1)
    began = liveness._present.since
    with doing("sum"):
        began = liveness._present.since
    mine._end_waiting("sum", began)
    assert not ended[mine]


def test_a_failure_elsewhere_ends_a_wait_before_its_timeout(
    make_watch: MakeWatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, failing = make_watch(1, 100 * PATIENCE), make_watch(2)
    mine.start()
    failing.publish_failure("shard-000000.tar: damaged")
    with doing("pipeline receive"):
        wait_for_end(mine)
    line = capsys.readouterr().err.splitlines()[0]
    assert "rank 2 (" in line and "failed: shard-000000.tar: damaged" in line
    assert "collective_timeout_seconds" not in line


def test_an_error_of_ones_own_in_a_collective_is_told_to_the_others(make_watch: MakeWatch) -> None:
    """Out of memory in a backward pass looks like a broken connection until the board is read."""
    mine, *others = make_watch(1), make_watch(0, PATIENCE), make_watch(2, PATIENCE)
    for other in others:
        other.start()
    mine._publish()
    text = fail_in("backward pass", mine)
    assert "no process is missing" in text
    failure = sign_of(mine).failure
    assert failure is not None and "out of memory" in failure and "backward pass" in failure


def test_the_error_of_a_broken_connection_names_who_is_gone(make_watch: MakeWatch) -> None:
    mine, living, dead = make_watch(1), make_watch(0, PATIENCE), make_watch(2)
    show_once(dead)
    living.start()
    mine._publish()
    text = fail_in("data parallel sum", mine)
    assert "lost its connection in data parallel sum; rank 2 (" in text
    assert sign_of(mine).failure is None and sign_of(mine).left
    # whoever left because of another is not accused by the next
    assert "rank 1 (" not in living._find_missing().text


def test_a_slow_backward_pass_is_no_reason_to_end_while_the_others_live(
    make_watch: MakeWatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, others = make_watch(1), [make_watch(0, PATIENCE), make_watch(2, PATIENCE)]
    for other in others:
        other.start()
    mine.start()
    with doing("backward pass", computes=True):
        time.sleep(8 * TIMEOUT)
        assert not ended[mine]
        others[1]._stopped.set()  # and now one of them stops
        wait_for_end(mine)
    line = capsys.readouterr().err.splitlines()[0]
    assert "in backward pass" in line and "; rank 2 (" in line and "no sign of life" in line


def test_only_after_the_first_step_those_who_live_must_come_in_time(
    make_watch: MakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "_present", liveness._Present())
    mine, *others = make_watch(1), make_watch(0, PATIENCE), make_watch(2, PATIENCE)
    for watch in [*others, mine]:
        watch.start()
    for place in ("step 1", "step 2"):
        with doing("broadcast"):
            time.sleep(8 * TIMEOUT)
            assert not ended[mine]
        arrive(place)
    with doing("broadcast"):
        wait_for_end(mine)


def test_who_ended_in_order_is_not_missed(make_watch: MakeWatch) -> None:
    """The last one may write for longer than the timeout after the others are done."""
    mine, *others = make_watch(1), make_watch(0), make_watch(2)
    for watch in [mine, *others]:
        watch.start()
    for other in others:
        other.stop()
    time.sleep(8 * TIMEOUT)
    assert not ended[mine]


def test_ones_own_error_is_not_hidden_by_others_that_are_elsewhere(make_watch: MakeWatch) -> None:
    """They wait for this process in some collective: that is not why it failed."""
    mine, *others = make_watch(1), make_watch(0), make_watch(2)
    is_over = threading.Event()

    def show_that_they_wait() -> None:
        for beat in itertools.count():
            for other in others:
                place = ("step 7", "data parallel sum")
                other.board.show(Sign(other.rank, "host", 1, beat, *place, None, False))
            if is_over.wait(INTERVAL):
                return

    thread = threading.Thread(target=show_that_they_wait)
    thread.start()
    mine._publish()
    text = fail_in("backward pass", mine)
    is_over.set()
    thread.join()
    assert "out of memory" in text
    failure = sign_of(mine).failure
    assert failure is not None and "out of memory" in failure


def test_a_board_that_answers_late_is_used_again(make_watch: MakeWatch) -> None:
    """The host of the store was suspended for a while."""
    watch = make_watch(1, PATIENCE)
    answers = threading.Event()
    board = watch.store

    class Late:
        def set(self, key: str, value: str) -> None:
            answers.wait()
            board.set(key, value)

    watch.board.store = cast("Store", Late())
    watch._publish()
    assert watch.board.is_silent
    assert not board.check(["liveness/1"])
    answers.set()
    deadline = time.monotonic() + PATIENCE
    while watch.board.is_silent and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    watch._publish()
    assert sign_of(watch).beat == 2


def test_who_looks_for_the_silent_is_not_silent_itself(make_watch: MakeWatch) -> None:
    """All of them look at the same time, because they waited for the same one."""
    mine = make_watch(1)
    mine._publish()
    before = sign_of(mine).beat
    mine._find_missing()
    assert sign_of(mine).beat >= before + 3


def test_a_closed_stderr_does_not_keep_a_process(
    make_watch: MakeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    mine = make_watch(1)
    monkeypatch.setattr(sys, "stderr", Closed())
    mine.start()
    with doing("sum"):
        wait_for_end(mine)


def fail_in(phase: str, watch: Liveness) -> str:
    """Raises in a phase; returns the explanation."""
    with pytest.raises(RuntimeError) as caught, doing(phase):
        raise RuntimeError("out of memory")
    return watch.explain(caught.value)


def test_the_place_is_on_the_board(make_watch: MakeWatch) -> None:
    mine = make_watch(1)
    arrive("evaluation after step 40")
    with doing("gather"):
        mine._publish()
    assert sign_of(mine).doing == "evaluation after step 40, gather"
