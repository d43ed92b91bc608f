"""What a process says of itself, phase in phase, without anybody who watches."""

from __future__ import annotations

import pytest

from data_pipeline.errors import StorageError
from megadlcm.parallel.watch.activity import THIS_PROCESS, Activity, arrive, doing
from tests.support.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def activity(clock: FakeClock) -> Activity:
    return Activity(clock)


def test_phases_nest_and_need_no_watch(clock: FakeClock, activity: Activity) -> None:
    with doing("outer", activity=activity):
        outer = activity.phase
        clock.sleep(1.0)
        with doing("inner", computes=True, activity=activity):
            assert (activity.phase.waits_for, activity.phase.computes) == ("inner", True)
            assert activity.phase.since == outer.since + 1.0
            clock.sleep(1.0)
        assert (activity.phase.waits_for, activity.phase.computes) == ("outer", False)
        assert activity.phase.since == outer.since + 2.0  # what was inside is no part of the wait
    assert activity.phase.waits_for is None and activity.phase.computes


def test_a_new_place_is_a_new_beginning(clock: FakeClock, activity: Activity) -> None:
    assert activity.phase.place == "start" and activity.phase.is_early
    clock.sleep(1.0)
    activity.arrive("step 1")
    assert activity.phase.since == clock.now() and activity.phase.is_early
    activity.arrive("step 2")
    assert activity.phase.place == "step 2" and not activity.phase.is_early


def test_the_first_collective_that_broke_is_kept(activity: Activity) -> None:
    with pytest.raises(RuntimeError), doing("outer", activity=activity):
        with pytest.raises(StorageError), doing("reading", activity=activity):
            raise StorageError("damaged")  # has a cause of its own
        assert activity.broke_in is None
        with doing("inner", activity=activity):
            raise RuntimeError("connection closed")
    assert activity.broke_in == "inner"


def test_the_process_has_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vars(THIS_PROCESS).items():
        monkeypatch.setattr(THIS_PROCESS, name, value)
    arrive("step 3")
    with doing("barrier"):
        assert (THIS_PROCESS.phase.place, THIS_PROCESS.phase.waits_for) == ("step 3", "barrier")
