"""In which order each stage runs its chunks: a pure function of its arguments. Stdlib only.

Every process computes the order of all stages, so that it knows what they send, and when.

A stage that is free runs a backward pass that is ready, else the forward pass of the deepest chunk
that is ready, as long as no more than (chunks - c) micro-batches are between the two at chunk c.
With one chunk for each stage that is 1F1B; with the folded placement it is its counterpart.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megadlcm.plan.accounting import TRAINING_PASSES


class Operation(NamedTuple):
    """One pass of one micro-batch through one chunk."""

    kind: str
    """`forward` or `backward`."""
    chunk: int
    """Index of the chunk."""
    micro_batch: int
    """Index of the micro-batch."""


@dataclass(frozen=True)
class Schedule:
    """The operations of every stage, and what they cost in a simulated run."""

    operations: tuple[tuple[Operation, ...], ...]
    """For each stage, in its order."""
    stage_of_chunk: tuple[int, ...]
    """Stage of each chunk."""
    makespan: float
    """Simulated time from the first operation to the end of the last, in units of cost."""
    bubble: float
    """Share of that time that the stages are idle, on average."""
    peak_in_flight: tuple[tuple[int, ...], ...]
    """For each stage, the micro-batches of each of its chunks that it holds between forward and
    backward, at the moment when the sum of their costs is largest; one entry for each own chunk."""


def pipeline_schedule(
    stage_of_chunk: Sequence[int],
    cost_of_chunk: Sequence[float],
    num_micro_batches: int,
    forward_only: bool = False,
) -> Schedule:
    """Orders forward and backward passes; a backward pass costs two forward passes.

    Args:
        stage_of_chunk: stage of each chunk, in the order of the computation.
        cost_of_chunk: forward cost of each chunk, any unit.
        num_micro_batches: micro-batches of a step.
        forward_only: leaves the backward passes out.

    Returns:
        The schedule.
    """
    simulation = _Simulation(stage_of_chunk, cost_of_chunk, num_micro_batches, forward_only)
    return simulation.run()


class _Simulation:
    """Discrete events: stages become free, what they made becomes ready for others."""

    # a simulation and not a rule: chunks differ in cost, and folded stages have two of them

    def __init__(
        self, stages: Sequence[int], costs: Sequence[float], micro_batches: int, forward_only: bool
    ) -> None:
        self.stages, self.forward_only = tuple(stages), forward_only
        # an operation that costs nothing would never let the clock go on
        smallest = max(costs, default=1.0) * 1e-6 or 1.0
        self.costs = [max(cost, smallest) for cost in costs]
        self.num_chunks, self.num_stages = len(stages), max(stages) + 1
        self.own = [
            [chunk for chunk, holder in enumerate(stages) if holder == stage]
            for stage in range(self.num_stages)
        ]
        # micro-batches of each chunk that were started and those that are ready to start
        self.started = {kind: [0] * self.num_chunks for kind in ("forward", "backward")}
        self.ready = {kind: [0] * self.num_chunks for kind in ("forward", "backward")}
        self.ready["forward"][0] = micro_batches
        self.operations: list[list[Operation]] = [[] for _ in range(self.num_stages)]
        self.done_backward = [0] * self.num_chunks
        self.peak: list[tuple[float, tuple[int, ...]]] = [(0.0, ()) for _ in range(self.num_stages)]

    def run(self) -> Schedule:
        """Plays the step."""
        events: list[tuple[float, int, Operation]] = []
        free = [True] * self.num_stages
        busy, now = 0.0, 0.0
        changed = set(range(self.num_stages))
        while True:
            # only a stage that became free, or got something to do, can start anything now
            for stage in sorted(changed):
                operation = self._choose(stage) if free[stage] else None
                if operation is not None:
                    free[stage] = False
                    passes = 1 if operation.kind == "forward" else TRAINING_PASSES - 1
                    cost = self.costs[operation.chunk] * passes
                    busy += cost
                    heapq.heappush(events, (now + cost, stage, operation))
            if not events:
                break
            now = events[0][0]
            changed.clear()
            # all that ends at this moment, so that nothing starts on half of it
            while events and events[0][0] <= now:
                _, stage, operation = heapq.heappop(events)
                free[stage] = True
                changed.add(stage)
                changed.add(self._complete(operation))
        return Schedule(
            tuple(map(tuple, self.operations)),
            self.stages,
            now,
            1.0 - busy / (now * self.num_stages) if now else 0.0,
            tuple(counts for _, counts in self.peak),
        )

    def _choose(self, stage: int) -> Operation | None:
        # backward first: it frees memory, and other stages wait for it
        for kind in ("backward", "forward"):
            started, ready = self.started[kind], self.ready[kind]
            # of two chunks the deeper one: its micro-batch is nearer to its backward pass
            for chunk in reversed(self.own[stage]):
                micro_batch = started[chunk]
                if micro_batch >= ready[chunk]:
                    continue
                # the bound of 1F1B: more would only be held longer, not be done earlier
                full = micro_batch - self.done_backward[chunk] >= self.num_chunks - chunk
                if kind == "forward" and full and not self.forward_only:
                    continue
                started[chunk] += 1
                operation = Operation(kind, chunk, micro_batch)
                self.operations[stage].append(operation)
                if kind == "forward":  # a backward pass that starts only holds what was held
                    self._note_peak(stage)
                return operation
        return None

    def _complete(self, operation: Operation) -> int:
        """Hands on what an operation made; the stage that can go on with it."""
        kind, chunk, _ = operation
        if kind == "backward":
            self.done_backward[chunk] += 1
            following = max(chunk - 1, 0)
            if chunk:
                self.ready["backward"][following] += 1
        else:
            following = min(chunk + 1, self.num_chunks - 1)
            if following > chunk:
                self.ready["forward"][following] += 1
            elif not self.forward_only:
                self.ready["backward"][chunk] += 1
        return self.stages[following]

    def _note_peak(self, stage: int) -> None:
        forward, done = self.started["forward"], self.done_backward
        counts = tuple(forward[chunk] - done[chunk] for chunk in self.own[stage])
        held = sum(
            count * self.costs[chunk] for count, chunk in zip(counts, self.own[stage], strict=True)
        )
        self.peak[stage] = max(self.peak[stage], (held, counts))
