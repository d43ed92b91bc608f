"""Where a model is cut into pipeline stages, balanced by FLOPs. Stdlib only.

Encoder and decoder blocks, backbone blocks and the head cost very different amounts, and what runs
on concepts runs on 1/R of the rows, so neither parameters nor layers say how long a stage takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_pipeline.errors import InputError
from megadlcm.config.model import ModelConfig
from megadlcm.plan.accounting import count_parameters, flops_per_token

Stream = Literal["tokens", "concepts"]
SEGMENTATION, READER = "segmentation", "concept_reader"


@dataclass(frozen=True)
class Unit:
    """Smallest piece of the model that a stage can hold."""

    name: str
    """`token_embedding`, `encoder.0`, ..., `segmentation`, `backbone.0`, ..., `lm_head`."""
    modules: tuple[str, ...]
    """Prefixes of the names of its parameters."""
    flops: float
    """Forward FLOPs of one token at the expected tokens per concept."""
    parameters: int
    """Parameters, before tensor parallelism."""
    stream: Stream
    """What it hands to the next unit."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive units that one stage runs without a message."""

    index: int
    """Place in the order of the computation."""
    stage: int
    """Stage that holds it."""
    units: tuple[Unit, ...]
    """The units."""

    @property
    def flops(self) -> float:
        """Forward FLOPs of one token."""
        return sum(unit.flops for unit in self.units)

    @property
    def parameters(self) -> int:
        """Parameters, before tensor parallelism."""
        return sum(unit.parameters for unit in self.units)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the units."""
        return tuple(unit.name for unit in self.units)


def model_units(
    model: ModelConfig, seq_len: int, tokens_per_concept: float | None = None
) -> list[Unit]:
    """Lists the units of a model in the order of the computation.

    Args:
        model: shape of the model.
        seq_len: tokens that attend to each other.
        tokens_per_concept: realised R; None means the target.

    Returns:
        Units whose FLOPs and parameters add up to those of `config.accounting`.
    """
    flops = flops_per_token(model, seq_len, tokens_per_concept)
    counts = count_parameters(model)
    d, c = model.d_token, model.d_concept
    units = [
        Unit("token_embedding", ("token_embedding",), 0.0, counts["token_embedding"], "tokens")
    ]

    def blocks(stack: str, num_layers: int, norm: int, stream: Stream) -> list[Unit]:
        return [
            Unit(
                f"{stack}.{index}",
                (f"{stack}.blocks.{index}",),
                flops[stack] / num_layers,
                (counts[stack] - norm) // num_layers,
                stream,
            )
            for index in range(num_layers)
        ]

    if model.architecture == "dlcm":
        units += blocks("encoder", model.encoder_layers, d, "tokens")
        units.append(
            Unit(
                SEGMENTATION,
                ("encoder.norm", "boundary_detector", "concept_pool"),
                flops["boundary_detector"] + flops["concept_pool"],
                d + counts["boundary_detector"] + counts["concept_pool"],
                "concepts",
            )
        )
        units += blocks("backbone", model.backbone_layers, c, "concepts")
        units.append(
            Unit(
                READER,
                ("backbone.norm", "concept_reader"),
                flops["concept_reader"],
                c + counts["concept_reader"],
                "tokens",
            )
        )
    layers = model.decoder_layers if model.architecture == "dlcm" else model.num_layers
    units += blocks("decoder", layers, d, "tokens")
    head = Unit(
        "lm_head", ("decoder.norm", "lm_head"), flops["lm_head"], d + counts["lm_head"], "tokens"
    )
    return [*units, head]


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
            "segmentation, concept reader, head); lower it"
        )
    cuts = _best_cuts(units, num_stages, folded)
    bounds = [0, *cuts, len(units)]
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
    names = [unit.name for unit in units]
    skip = None
    if folded and SEGMENTATION in names:
        skip = names.index(SEGMENTATION), names.index(READER)
        if _search(units, num_stages, folded, skip, math.inf, max) is None:
            skip = None  # no cut keeps both on one stage
    lightest = _search(units, num_stages, folded, skip, math.inf, max)
    assert lightest is not None
    limit = lightest.cost * (1 + 1e-12)
    best = _search(units, num_stages, folded, skip, limit, lambda cost, flops: cost + flops**2)
    assert best is not None
    return [*best.front, *best.back]


def _search(
    units: list[Unit],
    num_stages: int,
    folded: bool,
    skip: tuple[int, int] | None,
    limit: float,
    add: Callable[[float, float], float],
) -> _Best | None:
    """Dynamic programming over the stages, from the outside (both ends) inwards.

    Args:
        units: the units.
        num_stages: stages.
        folded: whether a stage has a chunk at both ends.
        skip: two units that must be on the same stage.
        limit: FLOPs that no stage may exceed.
        add: adds a stage to the cost.

    Returns:
        The cheapest cut; None if no cut keeps the conditions.
    """
    running = [0.0, *itertools.accumulate(unit.flops for unit in units)]
    states = {(0, len(units)): _Best(0.0, (), ())}
    for stage in range(num_stages - 1):
        reached: dict[tuple[int, int], _Best] = {}
        for (start, stop), best in states.items():
            for i, j in _next_cuts(start, stop, num_stages - 1 - stage, folded):
                flops = running[i] - running[start] + running[stop] - running[j]
                if flops > limit or (skip and _apart(skip, start, stop, i, j)):
                    continue
                found = _Best(
                    add(best.cost, flops),
                    (*best.front, i),
                    (j, *best.back) if folded else (),
                )
                if (i, j) not in reached or found < reached[i, j]:
                    reached[i, j] = found
        states = reached
    finished = [
        _Best(add(best.cost, running[stop] - running[start]), best.front, best.back)
        for (start, stop), best in states.items()
        if running[stop] - running[start] <= limit
    ]
    return min(finished, default=None)


def _next_cuts(start: int, stop: int, left: int, folded: bool) -> Iterator[tuple[int, int]]:
    """Where a stage may end, so that each of the `left` others still gets what it needs."""
    needed = 2 * left - 1 if folded else left
    for i in range(start + 1, stop - needed + 1):
        if not folded:
            yield i, stop
            continue
        for j in range(i + needed, stop):
            yield i, j


def _apart(skip: tuple[int, int], start: int, stop: int, i: int, j: int) -> bool:
    """Whether a folded stage holds one end of the skip connection and not the other."""
    segmentation, reader = (start <= end < i or j <= end < stop for end in skip)
    return segmentation != reader
