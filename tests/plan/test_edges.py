"""The list of what crosses between chunks is complete, and what is planned by it agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadlcm.config import load_config
from megadlcm.config.anatomy import Stream, UnitKind
from megadlcm.plan.edges import (
    Content,
    Edge,
    Number,
    edge_bytes,
    kept_edges,
    model_edges,
    riding_edges,
)
from megadlcm.plan.stages import Chunk, chunk_of, cut_chunks
from tests.support.tiny_models import tiny_config

SEQ_LEN = 128
TOKENS, CONCEPTS = Stream.TOKENS, Stream.CONCEPTS


def cut(num_stages: int, placement: str = "linear", **options: object) -> list[Chunk]:
    return cut_chunks(tiny_config(**options), SEQ_LEN, num_stages, placement)


def test_each_unit_in_a_chunk_of_its_own_lists_everything_once() -> None:
    """Ten units: two before the segmentation, six up to the reader, three after it."""
    model = tiny_config(boundary_mode="ema_ste")
    chunks = cut_chunks(model, SEQ_LEN, 10)
    segmentation, reader = (
        chunk_of(chunks, kind) for kind in (UnitKind.SEGMENTATION, UnitKind.CONCEPT_READER)
    )
    assert segmentation is not None and reader is not None and reader > segmentation + 1
    edges = model_edges(model, chunks, sequence_parallel=True)
    expected = []
    for source in range(9):
        target = source + 1
        if source >= segmentation:
            decision = Edge(
                Content.DECISIONS, source, target, number=Number.DECISION, has_gradient=False
            )
            expected += [decision, Edge(Content.SCORES, source, target, has_gradient=False)]
        rows = CONCEPTS if segmentation <= source < reader else TOKENS
        width = model.d_concept if rows is CONCEPTS else model.d_token
        expected.append(
            Edge(Content.STATES, source, target, rows, width, Number.STATE, is_sharded=True)
        )
        if source == segmentation:
            expected += [
                Edge(Content.HIDDEN, source, reader, TOKENS, model.d_token, Number.STATE),
                Edge(Content.CONFIDENCE, source, reader),
            ]
    assert list(edges) == expected


@pytest.mark.parametrize(
    ("options", "contents"),
    [
        ({"architecture": "dense"}, ["states"]),
        ({}, ["decisions", "scores", "states", "hidden"]),
        ({"boundary_mode": "ema_ste"}, ["decisions", "scores", "states", "hidden", "confidence"]),
    ],
)
def test_kinds_of_models_send_different_things(
    options: dict[str, str], contents: list[str]
) -> None:
    edges = model_edges(tiny_config(**options), cut(2, **options), sequence_parallel=False)
    assert [edge.content for edge in edges] == contents  # between two chunks, in this order
    assert not any(edge.is_sharded for edge in edges)


def test_one_chunk_sends_nothing() -> None:
    assert model_edges(tiny_config(), cut(1), sequence_parallel=False) == ()


def test_decisions_come_before_states_whose_number_they_tell() -> None:
    edges = model_edges(tiny_config(), cut(5), sequence_parallel=False)
    for index, edge in enumerate(edges):
        if edge.rows is CONCEPTS:
            before = edges[:index]
            assert (Content.DECISIONS, edge.source, edge.target) in {
                (other.content, other.source, other.target) for other in before
            }


def test_riding_goes_from_chunk_to_chunk_and_carries_as_much() -> None:
    edges = model_edges(tiny_config(), cut(10), sequence_parallel=False)
    (skip,) = (edge for edge in edges if edge.content is Content.HIDDEN)
    ridden = [edge for edge in riding_edges(edges) if edge.content is Content.HIDDEN]
    assert [(edge.source, edge.target) for edge in ridden] == [
        (chunk, chunk + 1) for chunk in range(skip.source, skip.target)
    ]
    assert len(ridden) > 1 and {edge.width for edge in ridden} == {skip.width}
    others = [edge for edge in riding_edges(edges) if edge.content is not Content.HIDDEN]
    assert others == [edge for edge in edges if edge is not skip]


@pytest.mark.parametrize("placement", ["linear", "folded"])
def test_a_chunk_keeps_what_it_sends_on_and_token_states_of_other_stages(placement: str) -> None:
    chunks = cut(6, placement, encoder_layers=3, decoder_layers=3)
    holder = chunk_of(chunks, UnitKind.SEGMENTATION)
    assert holder is not None
    edges = model_edges(tiny_config(), chunks, sequence_parallel=False)
    for chunk in chunks:
        kept = kept_edges(edges, chunks, chunk.index)
        sent = [edge for edge in kept if edge.source == chunk.index]
        came = [edge for edge in kept if edge.target == chunk.index]
        assert len(sent) + len(came) == len(kept)
        assert [edge.content for edge in sent] == ["states"] * (chunk is not chunks[-1])
        reads = UnitKind.CONCEPT_READER in chunk.kinds
        elsewhere = chunks[holder].stage != chunk.stage
        if reads:  # folded, the reader lies with the segmentation
            assert elsewhere == (placement == "linear")
        assert [edge.content for edge in came] == ["hidden"] * (reads and elsewhere)


def test_bytes_follow_precision_and_shards(run_file: Path) -> None:
    states = Edge(Content.STATES, 0, 1, CONCEPTS, 24, Number.STATE, is_sharded=True)
    overrides = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    half = load_config(run_file, [*overrides, "training.precision=bf16"])
    assert edge_bytes(half, states, 100, 30) == 30 * 24 * 2 / 2
    assert edge_bytes(load_config(run_file), states, 100, 30) == 30 * 24 * 4
    scores = Edge(Content.SCORES, 0, 1, has_gradient=False)
    assert edge_bytes(half, scores, 100, 30) == 100 * 4  # whole and in fp32 whatever the precision
    decisions = Edge(Content.DECISIONS, 0, 1, number=Number.DECISION, has_gradient=False)
    assert edge_bytes(half, decisions, 100, 30) == 100
