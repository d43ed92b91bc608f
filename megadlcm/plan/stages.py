"""Where a model is cut into pipeline stages, balanced by FLOPs. Stdlib only.

Encoder and decoder blocks, backbone blocks and the head cost very different amounts, and what runs
on concepts runs on 1/R of the rows, so neither parameters nor layers say how long a stage takes.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from data_pipeline.errors import InputError
from megadlcm.config.anatomy import Stream, UnitId, UnitKind, unit_ids
from megadlcm.config.model import ModelConfig
from megadlcm.plan.accounting import count_parameters, flops_per_token


@dataclass(frozen=True)
class Unit:
    """Smallest part of the model that a stage can hold, with what it costs."""

    id: UnitId
    """Which one."""
    modules: tuple[str, ...]
    """Prefixes of the names of its parameters."""
    flops: float
    """Forward FLOPs of one token at the expected tokens per concept."""
    parameters: int
    """Parameters, before tensor parallelism."""

    @property
    def kind(self) -> UnitKind:
        return self.id.kind

    @property
    def name(self) -> str:
        return self.id.name


@dataclass(frozen=True)
class Chunk:
    """Consecutive units that one stage runs without a message."""

    index: int
    """Place in the order of the computation."""
    stage: int
    """Stage that holds it."""
    units: tuple[Unit, ...]
    """The units."""

    # cached, as thousands of layouts share a cut
    @cached_property
    def flops(self) -> float:
        """Forward FLOPs of one token."""
        return sum(unit.flops for unit in self.units)

    @cached_property
    def parameters(self) -> int:
        """Parameters, before tensor parallelism."""
        return sum(unit.parameters for unit in self.units)

    @property
    def unit_ids(self) -> tuple[UnitId, ...]:
        return tuple(unit.id for unit in self.units)

    @cached_property
    def kinds(self) -> dict[UnitKind, int]:
        """How many units it has of each kind, in the order of the computation."""
        return dict(Counter(unit.kind for unit in self.units))


def chunk_of(chunks: Sequence[Chunk], kind: UnitKind) -> int | None:
    """Index of the first chunk with a unit of this kind; None if the model has none."""
    return next((chunk.index for chunk in chunks if kind in chunk.kinds), None)


def width_of(model: ModelConfig, stream: Stream) -> int:
    """Numbers of a row of states."""
    return model.d_concept if stream is Stream.CONCEPTS else model.d_token


# (stack whose last norm it holds, parts of the accounting) of each kind that exists once
_CONTENTS: dict[UnitKind, tuple[UnitKind | None, tuple[str, ...]]] = {
    UnitKind.TOKEN_EMBEDDING: (None, ("token_embedding",)),
    UnitKind.SEGMENTATION: (UnitKind.ENCODER, ("boundary_detector", "concept_pool")),
    UnitKind.CONCEPT_READER: (UnitKind.BACKBONE, ("concept_reader",)),
    UnitKind.LM_HEAD: (UnitKind.DECODER, ("lm_head",)),
}


def model_units(
    model: ModelConfig, seq_len: int, tokens_per_concept: float | None = None
) -> list[Unit]:
    """Lists the units of a model in the order of the computation.

    Args:
        model: shape of the model.
        seq_len: tokens that attend to each other.
        tokens_per_concept: realised R; None means the target.

    Returns:
        Units whose FLOPs and parameters add up to those of `plan.accounting`.
    """
    flops = flops_per_token(model, seq_len, tokens_per_concept)
    counts, ids = count_parameters(model), unit_ids(model)
    layers = Counter(unit.kind for unit in ids)
    units = []
    for unit in ids:
        kind, stack = unit.kind, unit.kind.label
        if kind.is_block:
            # the accounting gives a stack its last norm, which the unit after the stack holds
            in_blocks = counts[stack] - width_of(model, kind.stream)
            modules: tuple[str, ...] = (f"{stack}.blocks.{unit.index}",)
            units.append(
                Unit(unit, modules, flops[stack] / layers[kind], in_blocks // layers[kind])
            )
            continue
        closed, parts = _CONTENTS[kind]
        parameters, modules = sum(counts[part] for part in parts), parts
        if closed is not None:
            parameters += width_of(model, closed.stream)
            modules = (f"{closed.label}.norm", *parts)
        cost = sum((flops.get(part, 0.0) for part in parts), 0.0)
        units.append(Unit(unit, modules, cost, parameters))
    return units


def cut_chunks(
    model: ModelConfig, seq_len: int, num_stages: int, placement: str = "linear"
) -> list[Chunk]:
    """Cuts a model into chunks so that the heaviest stage is as light as it can be.

    `linear` gives stage i chunk i. `folded` gives stage i < S - 1 the chunks i and 2 S - 2 - i and
    the last stage one: the model goes down the stages and comes back up, and the concept reader
    lies on the stage of the segmentation where that is possible, so that token states stay there.
    Among cuts with the same heaviest stage one with the smallest sum of squares is taken.

    Args:
        model: shape of the model.
        seq_len: tokens that attend to each other.
        num_stages: stages, S.
        placement: `linear` or `folded`.

    Returns:
        Chunks in the order of the computation.

    Raises:
        InputError: the model has fewer units than there are chunks.
    """
    units = model_units(model, seq_len)
    folded = placement == "folded"
    num_chunks = 2 * num_stages - 1 if folded else num_stages
    if num_chunks > len(units):
        raise InputError(
            f"parallel.pipeline_parallel_size = {num_stages} cuts the model into {num_chunks} "
            f"chunks ({placement}), must be at most its {len(units)} units (embedding, blocks, "
            "segmentation, concept reader, head); lower it",
            key="parallel.pipeline_parallel_size",
        )
    # deterministic: every process finds the same cut without asking the others
    cuts = _best_cuts(units, num_stages, folded)
    bounds = [0, *cuts, len(units)]
    # a folded model comes back up: chunk 2 S - 2 is on stage 0 again
    return [
        Chunk(
            index,
            index if index < num_stages else 2 * num_stages - 2 - index,
            tuple(units[bounds[index] : bounds[index + 1]]),
        )
        for index in range(num_chunks)
    ]


class _Best(NamedTuple):
    cost: float
    """What is minimised, so far."""
    front: tuple[int, ...]
    """Cuts before the middle."""
    back: tuple[int, ...]
    """Cuts after it."""


def _best_cuts(units: list[Unit], num_stages: int, folded: bool) -> list[int]:
    """Cuts between the chunks: first the heaviest stage is minimised, then the sum of squares."""
    search = _Search(units, num_stages, folded)
    lightest = search.lightest()
    if lightest is None:  # no cut keeps both ends of the skip connection on one stage
        search.skip = None
        lightest = search.lightest()
    assert lightest is not None
    # the two searches add in another order: without slack the last bit could exclude every cut
    best = search.run(lightest * (1 + 1e-12), lambda cost, flops: cost + flops**2)
    assert best is not None
    return [*best.front, *best.back]


class _Search:
    """Dynamic programming over the stages, from the outside (both ends) inwards.

    Args:
        units: the units.
        num_stages: stages.
        folded: whether a stage has a chunk at both ends.
    """

    def __init__(self, units: list[Unit], num_stages: int, folded: bool) -> None:
        self.num_units, self.num_stages, self.folded = len(units), num_stages, folded
        self.running = [0.0, *itertools.accumulate(unit.flops for unit in units)]
        kinds = [unit.kind for unit in units]
        self.skip: tuple[int, int] | None = None
        """Two units that must be on the same stage."""
        if folded and UnitKind.SEGMENTATION in kinds:
            self.skip = kinds.index(UnitKind.SEGMENTATION), kinds.index(UnitKind.CONCEPT_READER)

    def lightest(self) -> float | None:
        """FLOPs of the heaviest stage where it is lightest; None if no cut keeps the conditions."""
        mean = self.running[-1] / self.num_stages
        heaviest = max(after - before for before, after in itertools.pairwise(self.running))
        # a tight limit leaves few cuts to try, and what it excludes is heavier than what it finds
        for slack in (1.1, 1.5, math.inf):
            found = self.run(slack * max(mean, heaviest), max)
            if found is not None:
                return found.cost
        return None

    def run(self, limit: float, add: Callable[[float, float], float]) -> _Best | None:
        """Finds the cheapest cut; None if no cut keeps the conditions.

        Args:
            limit: FLOPs that no stage may exceed.
            add: adds a stage to the cost.
        """
        states = {(0, self.num_units): _Best(0.0, (), ())}
        for stage in range(self.num_stages - 1):
            reached: dict[tuple[int, int], _Best] = {}
            for (start, stop), best in states.items():
                for i, j, flops in self._next_cuts(start, stop, self.num_stages - 1 - stage, limit):
                    cost, known = add(best.cost, flops), reached.get((i, j))
                    if known is not None and known.cost < cost:
                        continue
                    # of equal costs the first cuts decide, so that every process finds the same
                    back = (j, *best.back) if self.folded else ()
                    found = _Best(cost, (*best.front, i), back)
                    if known is None or found < known:
                        reached[i, j] = found
            states = reached
        finished = []
        for (start, stop), best in states.items():
            flops = self.running[stop] - self.running[start]  # the last stage takes the middle
            if flops <= limit:
                finished.append(best._replace(cost=add(best.cost, flops)))
        return min(finished, default=None)

    def _next_cuts(
        self, start: int, stop: int, left: int, limit: float
    ) -> Iterator[tuple[int, int, float]]:
        """Where a stage may end so that each of the `left` others gets a unit, and its FLOPs."""
        needed = 2 * left - 1 if self.folded else left
        running = self.running
        for i in range(start + 1, stop - needed + 1):
            front = running[i] - running[start]
            if front > limit:
                break
            # a middle too heavy for the others leads nowhere; rounding must not decide that
            last = bisect_right(running, running[i] + left * limit * (1 + 1e-9)) - 1
            # from the lightest back chunk to heavier ones: after the first too heavy stage all are
            backs = range(min(last, stop - 1), i + needed - 1, -1)
            for j in backs if self.folded else (stop,) if stop <= last else ():
                flops = front + running[stop] - running[j]
                if flops > limit:
                    break
                if self.skip is None or not _apart(*self.skip, start, stop, i, j):
                    yield i, j, flops


def _apart(segmentation: int, reader: int, start: int, stop: int, i: int, j: int) -> bool:
    """Whether a folded stage holds one end of the skip connection and not the other."""
    holds_segmentation = start <= segmentation < i or j <= segmentation < stop
    return holds_segmentation != (start <= reader < i or j <= reader < stop)
