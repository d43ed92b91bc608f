"""What crosses from chunk to chunk of a model that is cut: the one list of it. No torch.

`parallel.pipeline` sends and receives by this list, `plan.traffic` counts its bytes and
`plan.memory` what is kept for it. For each micro-batch of T tokens and M concepts:

| content      | from -> to                                      | rows x width     | gradient |
|--------------|-------------------------------------------------|------------------|----------|
| `decisions`  | a chunk after the segmentation -> the next one  | T, one byte each | -        |
| `scores`     | the same                                        | T, fp32 or wider | -        |
| `states`     | every chunk -> the next one                     | T x D or M x C   | yes      |
| `hidden`     | segmentation -> concept reader, straight        | T x D            | yes      |
| `confidence` | the same, straight-through modes                | T, fp32 or wider | yes      |

"After the segmentation" includes the chunk that holds it. A gradient has the shape of what it is
of, and goes the other way. With sequence parallelism each process of a tensor parallel group sends
its own shard of the rows of `states`; everything else is whole on each of them. M is known from the
decisions: they come first, so no message carries a shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from megadlcm.config import ModelConfig, RunConfig
from megadlcm.config.anatomy import Stream, UnitKind
from megadlcm.config.constants import FP32_BYTES
from megadlcm.plan.activations import element_size, rows_of
from megadlcm.plan.stages import Chunk, chunk_of, width_of


class Content(StrEnum):
    """What a message carries; also its name in logs and counts."""

    DECISIONS = "decisions"
    """Two bits for each token: the boundary decision, and the one that evaluation would take."""
    SCORES = "scores"
    """Boundary probabilities."""
    STATES = "states"
    """What the last unit of a chunk leaves."""
    HIDDEN = "hidden"
    """Output of the encoder."""
    CONFIDENCE = "confidence"
    """Boundary probabilities once more, where the reader has a gradient for them."""


class Number(Enum):
    """Type of a number of a message."""

    DECISION = "decision"
    """A byte."""
    SCORE = "score"
    """fp32, or the type of the states if that is wider."""
    STATE = "state"
    """The precision of the arithmetic."""


@dataclass(frozen=True)
class Edge:
    """One tensor that each micro-batch sends from a chunk to a later one."""

    content: Content
    """What it carries."""
    source: int
    """Chunk that makes it."""
    target: int
    """Chunk that needs it."""
    rows: Stream = Stream.TOKENS
    """One row for each of these."""
    width: int = 1
    """Numbers of a row."""
    number: Number = Number.SCORE
    """Their type."""
    has_gradient: bool = True
    """Whether the target sends a gradient back."""
    is_sharded: bool = False
    """Whether each process of a tensor parallel group sends a shard of the rows."""


def model_edges(
    model: ModelConfig, chunks: Sequence[Chunk], sequence_parallel: bool
) -> tuple[Edge, ...]:
    """Lists what crosses, by source and for each source in the order in which it sends.

    Args:
        model: shape of the model.
        chunks: the cut.
        sequence_parallel: whether processes of a tensor parallel group keep shards of the rows.

    Returns:
        The edges; those between chunks of one stage included, which no wire carries.
    """
    segmentation = chunk_of(chunks, UnitKind.SEGMENTATION)
    reader = chunk_of(chunks, UnitKind.CONCEPT_READER)
    edges: list[Edge] = []
    for chunk, following in itertools.pairwise(chunks):
        source, target = chunk.index, following.index
        if segmentation is not None and source >= segmentation:
            # before the states: a receiver learns from them how many concepts there are
            edges.append(
                Edge(Content.DECISIONS, source, target, number=Number.DECISION, has_gradient=False)
            )
            edges.append(Edge(Content.SCORES, source, target, has_gradient=False))
        stream = chunk.units[-1].kind.stream  # a cut inside the backbone sends concepts
        edges.append(
            Edge(
                Content.STATES,
                source,
                target,
                stream,
                width_of(model, stream),
                Number.STATE,
                is_sharded=sequence_parallel,
            )
        )
        if source == segmentation and reader is not None and reader > source:
            # whole even with sequence parallelism: pool and reader need every token
            hidden = Edge(Content.HIDDEN, source, reader, width=model.d_token, number=Number.STATE)
            edges.append(hidden)
            if model.boundary.is_straight_through:
                # on its own edge: scores that only tell of decisions have no gradient
                edges.append(Edge(Content.CONFIDENCE, source, reader))
    return tuple(edges)


def riding_edges(edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """The same if what skips chunks rode along from chunk to chunk, which the pipeline avoids."""
    return tuple(
        dataclasses.replace(edge, source=index, target=index + 1)
        for edge in edges
        for index in range(edge.source, edge.target)
    )


def kept_edges(edges: Iterable[Edge], chunks: Sequence[Chunk], index: int) -> tuple[Edge, ...]:
    """Edges whose tensor a chunk keeps between forward and backward beside what its units keep.

    The states that it sends on, which their gradient comes back to, and token states that came from
    another stage. What came from the chunk before is the input of its first unit, and token states
    of the own stage are those that the segmentation keeps.
    """
    stage = chunks[index].stage
    return tuple(
        edge
        for edge in edges
        if (edge.content is Content.STATES and edge.source == index)
        or (
            edge.content is Content.HIDDEN
            and edge.target == index
            and chunks[edge.source].stage != stage
        )
    )


def edge_bytes(config: RunConfig, edge: Edge, num_tokens: float, num_concepts: float) -> float:
    """Bytes of one micro-batch that one process sends over an edge, in one direction.

    Args:
        config: the run.
        edge: the edge.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M.
    """
    sizes = {Number.DECISION: 1, Number.SCORE: FP32_BYTES, Number.STATE: element_size(config)}
    rows = rows_of(edge.rows, num_tokens, num_concepts)
    # an odd row fills up the last shard, which an expected number of concepts cannot say
    shards = config.parallel.tensor_parallel_size if edge.is_sharded else 1
    return rows * edge.width * sizes[edge.number] / shards
