"""Where a model is cut into pipeline stages, balanced by FLOPs. Stdlib only.

Encoder and decoder blocks, backbone blocks and the head cost very different amounts, and what runs
on concepts runs on 1/R of the rows, so neither parameters nor layers say how long a stage takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_pipeline.errors import InputError
from megadlcm.config.accounting import count_parameters, flops_per_token
from megadlcm.config.model import ModelConfig

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
    Among cuts with the same heaviest stage the one with the smallest sum of squares is taken.

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
    cost: tuple[float, float, float]
    """Heaviest stage, separated skip connection, sum of squares."""
    front: tuple[int, ...]
    """Cuts before the middle."""
    back: tuple[int, ...]
    """Cuts after it."""


def _best_cuts(units: list[Unit], num_stages: int, folded: bool) -> list[int]:
    """Cuts between the chunks, by dynamic programming from the outside (both ends) inwards."""
    running = [0.0]
    for unit in units:
        running.append(running[-1] + unit.flops)
    names = [unit.name for unit in units]
    skip = (names.index(SEGMENTATION), names.index(READER)) if SEGMENTATION in names else None
    states: dict[tuple[int, int], _Best] = {(0, len(units)): _Best((0.0, 0.0, 0.0), (), ())}
    for stage in range(num_stages - 1):
        left = num_stages - 1 - stage
        reached: dict[tuple[int, int], _Best] = {}
        for (start, stop), best in states.items():
            for i, j in _next_cuts(start, stop, left, folded):
                flops = running[i] - running[start] + running[stop] - running[j]
                apart = folded and skip is not None and _apart(skip, start, stop, i, j)
                cost = _worse(best.cost, flops, apart)
                found = _Best(cost, (*best.front, i), (j, *best.back) if folded else ())
                if (i, j) not in reached or found < reached[i, j]:
                    reached[i, j] = found
        states = reached
    finished = [
        _Best(_worse(best.cost, running[stop] - running[start], False), best.front, best.back)
        for (start, stop), best in states.items()
    ]
    best = min(finished)
    return [*best.front, *best.back]


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


def _worse(
    cost: tuple[float, float, float], flops: float, apart: bool
) -> tuple[float, float, float]:
    heaviest, separated, squares = cost
    return max(heaviest, flops), max(separated, float(apart)), squares + flops**2
