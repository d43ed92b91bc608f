"""Every stage runs its passes in an order that can be run, which all processes agree on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadlcm.plan.schedule import Operation, Schedule, pipeline_schedule

costs = st.lists(st.floats(0.0, 8.0), min_size=1, max_size=7)


def linear(num_stages: int) -> list[int]:
    return list(range(num_stages))


def folded(num_stages: int) -> list[int]:
    return [*range(num_stages), *reversed(range(num_stages - 1))]


def needs(operation: Operation, num_chunks: int) -> list[Operation]:
    """What must be over before an operation can run."""
    kind, chunk, micro_batch = operation
    if kind == "forward":
        return [Operation("forward", chunk - 1, micro_batch)] if chunk else []
    before = [Operation("forward", chunk, micro_batch)]
    if chunk + 1 < num_chunks:
        before.append(Operation("backward", chunk + 1, micro_batch))
    return before


def play(operations: tuple[tuple[Operation, ...], ...], num_chunks: int) -> list[Operation]:
    """Runs the stages as processes would, each waiting for what its next operation needs."""
    done: list[Operation] = []
    positions = [0] * len(operations)
    while True:
        moved = False
        for stage, own in enumerate(operations):
            while positions[stage] < len(own):
                operation = own[positions[stage]]
                if any(before not in done for before in needs(operation, num_chunks)):
                    break
                done.append(operation)
                positions[stage] += 1
                moved = True
        if not moved:
            return done


def flat(schedule: Schedule) -> list[Operation]:
    return [operation for own in schedule.operations for operation in own]


@settings(deadline=None, max_examples=60)
@given(
    costs=costs, num_micro_batches=st.integers(1, 9), folds=st.booleans(), training=st.booleans()
)
def test_every_pass_runs_once_on_its_stage_and_nobody_waits_for_ever(
    costs: list[float], num_micro_batches: int, folds: bool, training: bool
) -> None:
    num_chunks = len(costs) - (folds and len(costs) % 2 == 0)
    stages = folded((num_chunks + 1) // 2) if folds else linear(num_chunks)
    schedule = pipeline_schedule(stages, costs[:num_chunks], num_micro_batches, not training)
    kinds = ("forward", "backward") if training else ("forward",)
    expected = itertools.product(kinds, range(num_chunks), range(num_micro_batches))
    assert sorted(flat(schedule)) == sorted(Operation(*each) for each in expected)
    for stage, own in enumerate(schedule.operations):
        assert all(stages[operation.chunk] == stage for operation in own)
    assert len(play(schedule.operations, num_chunks)) == len(flat(schedule))


def test_an_order_that_cannot_run_would_be_seen() -> None:
    schedule = pipeline_schedule(linear(2), [1.0, 1.0], 2)
    first, second = schedule.operations
    swapped = (first, (second[1], second[0], *second[2:]))  # backward before forward
    assert len(play(swapped, 2)) < len(flat(schedule))


@settings(deadline=None, max_examples=60)
@given(costs=costs, num_micro_batches=st.integers(1, 9), folds=st.booleans())
def test_each_chunk_keeps_the_order_of_micro_batches_and_a_bound(
    costs: list[float], num_micro_batches: int, folds: bool
) -> None:
    """Messages of one chunk arrive in the order in which they are needed."""
    num_chunks = len(costs) - (folds and len(costs) % 2 == 0)
    stages = folded((num_chunks + 1) // 2) if folds else linear(num_chunks)
    schedule = pipeline_schedule(stages, costs[:num_chunks], num_micro_batches)
    for stage, own in enumerate(schedule.operations):
        held, heaviest = dict.fromkeys(range(num_chunks), 0), 0.0
        for operation in own:
            held[operation.chunk] += 1 if operation.kind == "forward" else -1
            assert 0 <= held[operation.chunk] <= num_chunks - operation.chunk
            weight = sum(count * costs[chunk] for chunk, count in held.items())
            heaviest = max(heaviest, weight)
        mine = [chunk for chunk in range(num_chunks) if stages[chunk] == stage]
        for kind, chunk in itertools.product(("forward", "backward"), mine):
            order = [op.micro_batch for op in own if op[:2] == (kind, chunk)]
            assert order == list(range(num_micro_batches))
        # what memory is planned for; costs of nothing are raised to a millionth of the largest
        peak = zip(mine, schedule.peak_in_flight[stage], strict=True)
        planned = sum(count * costs[chunk] for chunk, count in peak)
        assert planned == pytest.approx(heaviest, rel=1e-4, abs=1e-4 * max(costs))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8, 32])
def test_equal_stages_run_one_forward_one_backward(num_stages: int, num_micro_batches: int) -> None:
    """Order and idle share of 1F1B in closed form: (S - 1) / (m + S - 1)."""
    schedule = pipeline_schedule(linear(num_stages), [1.0] * num_stages, num_micro_batches)
    for stage, own in enumerate(schedule.operations):
        warm_up = min(num_stages - stage - 1, num_micro_batches)
        kinds = ["forward"] * warm_up
        kinds += ["forward", "backward"] * (num_micro_batches - warm_up)
        kinds += ["backward"] * warm_up
        assert [operation.kind for operation in own] == kinds
        assert schedule.peak_in_flight[stage] == (min(num_stages - stage, num_micro_batches),)
    idle = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    assert schedule.bubble == pytest.approx(idle)
    assert schedule.makespan == pytest.approx(3 * (num_micro_batches + num_stages - 1))


def test_one_process_runs_each_micro_batch_forward_and_back() -> None:
    schedule = pipeline_schedule([0], [2.0], 3)
    assert schedule.operations == (
        tuple(Operation(kind, 0, m) for m in range(3) for kind in ("forward", "backward")),
    )
    assert (schedule.bubble, schedule.peak_in_flight) == (0.0, ((1,),))


@pytest.mark.parametrize("stages", [linear(4), folded(3)])
def test_the_heaviest_stage_bounds_the_time_from_below(stages: list[int]) -> None:
    work = [1.0, 2.5, 1.5, 3.0, 0.5][: len(stages)]
    schedule = pipeline_schedule(stages, work, 16)
    loads = [
        sum(w for w, s in zip(work, stages, strict=True) if s == stage) for stage in set(stages)
    ]
    assert schedule.makespan >= 3 * 16 * max(loads)
    busy = 3 * 16 * sum(work) / (len(loads) * schedule.makespan)
    assert schedule.bubble == pytest.approx(1 - busy)
    assert schedule.bubble > 0


@pytest.mark.parametrize("stages", [linear(3), folded(3)])
def test_all_processes_find_the_same_order(stages: list[int]) -> None:
    work = [0.1 * (index + 1) for index in range(len(stages))]
    first = pipeline_schedule(stages, work, 12)
    assert first == pipeline_schedule(tuple(stages), tuple(work), 12)
    other = pipeline_schedule(stages, list(reversed(work)), 12)
    assert other.makespan != first.makespan  # and costs do matter


def test_a_folded_stage_holds_its_early_chunk_longest() -> None:
    schedule = pipeline_schedule(folded(3), [1.0] * 5, 12)
    assert schedule.stage_of_chunk == (0, 1, 2, 1, 0)
    assert all(early > late for early, late in (p for p in schedule.peak_in_flight if len(p) == 2))
    assert [len(peak) for peak in schedule.peak_in_flight] == [2, 2, 1]


def test_many_micro_batches_and_chunks_are_scheduled() -> None:
    schedule = pipeline_schedule(folded(8), [1.0 + 0.1 * c for c in range(15)], 1024)
    assert len(flat(schedule)) == 2 * 15 * 1024
    longer = pipeline_schedule(folded(8), [1.0 + 0.1 * c for c in range(15)], 256)
    assert schedule.peak_in_flight == longer.peak_in_flight
    assert schedule.bubble < longer.bubble
