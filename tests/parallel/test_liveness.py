"""What one process says of the others, on a board in this process."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from megadlcm.parallel import liveness
from megadlcm.parallel.liveness import EXIT_CODE, Liveness, arrive, doing
from megadlcm.parallel.signs_of_life import Sign

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
    monkeypatch.setattr(liveness, "_present", liveness._Present(place="step 7"))
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
        with doing("inner"):
            assert liveness._present.waits_for == "inner"
        assert (liveness._present.waits_for, liveness._present.since) == ("outer", outer)
    assert liveness._present.waits_for is None


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
    assert "rank 2 never gave a sign of life" in mine._find_missing()


def test_computing_and_short_waits_are_no_reason_to_end(make_watch: MakeWatch) -> None:
    mine = make_watch(1)
    mine.start()
    time.sleep(4 * TIMEOUT)  # a long step, an evaluation, a checkpoint
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
    assert "rank 1 (" not in living._find_missing()


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
