"""What a plan says is sent is what processes send, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadlcm.config import RunConfig, load_config
from megadlcm.config.anatomy import Stream, UnitId, UnitKind, unit_ids
from megadlcm.model.units import run_units, start_flow
from megadlcm.parallel.partition import build_stage_model, make_partition
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.edges import Content, Edge, Number, edge_bytes, model_edges
from megadlcm.plan.stages import chunk_of
from megadlcm.plan.traffic import counts_first, data_bytes, sent_by_stage, tensor_bytes
from tests.support.distributed import run_distributed
from tests.support.memory_probe import probe_batch, probe_model
from tests.support.parity import NUM_STEPS, Layout, Trace, parity_run, trace, write_uneven
from tests.support.tiny_runs import write_corpus

LENGTHS = [64, 7, 41]
SIZE = 2
ON_CONCEPTS = (UnitKind.SEGMENTATION, UnitKind.BACKBONE, UnitKind.CONCEPT_READER)


@contextlib.contextmanager
def counted() -> Iterator[list[float]]:
    """Counts what this process sends in collectives, as rings do."""
    sent = [0.0]
    share = (SIZE - 1) / SIZE
    volumes = {  # a sum sends its tensor twice but for the own part; the others the whole one once
        "all_reduce": lambda tensor, *_: 2 * share * tensor.nbytes,
        "all_gather_into_tensor": lambda whole, *_: share * whole.nbytes,
        "reduce_scatter_tensor": lambda _kept, whole, *_: share * whole.nbytes,
        "broadcast": lambda tensor, *_: tensor.nbytes,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, volume in volumes.items():
            original = getattr(dist, name)

            def count(
                *arguments: Any, original: Any = original, volume: Any = volume, **options: Any
            ) -> Any:
                sent[0] += volume(*arguments)
                return original(*arguments, **options)

            patch.setattr(dist, name, count)
        yield sent


def sent_by_units(config: RunConfig) -> tuple[dict[UnitId, float], int]:
    """Bytes of forward and backward pass of each unit alone; and the concepts."""
    model = build_stage_model(config, join_process_group(config.parallel))
    model, batch = probe_model(config, model), probe_batch(config, LENGTHS)
    flow, sent, num_concepts = start_flow(model, batch), {}, 0
    for unit in unit_ids(config.model):
        leaves = []
        for name in ("states", "hidden_TD"):
            tensor = getattr(flow, name)
            if tensor is not None:
                leaves.append(tensor.detach().requires_grad_())
                setattr(flow, name, leaves[-1])
        with counted() as bytes_of_unit:
            run_units(model, [unit], flow)
            results = [flow.states, flow.hidden_TD]
            if unit.kind is UnitKind.LM_HEAD:
                results = [flow.output.token_losses(batch.tokens_T)]
            roots = [r for r in results if r is not None and r.grad_fn is not None]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        sent[unit] = bytes_of_unit[0]
        num_concepts = flow.layout.num_concepts if flow.layout else 0
    return sent, num_concepts


def all_sent_by_units(configs: list[RunConfig]) -> list[tuple[dict[UnitId, float], int]]:
    return [sent_by_units(config) for config in configs]


def test_layers_send_what_the_formula_says(run_file: Path) -> None:
    """Every kind of unit, all kinds of recomputation, whole rows and shards."""
    configs = [
        load_config(
            run_file,
            [
                f"data.seq_len={max(LENGTHS)}",
                "parallel.tensor_parallel_size=2",
                f"parallel.recompute={recompute}",
                f"parallel.sequence_parallel={rows}",
                f"training.precision={precision}",
                f"model.self_attention_qk_norm={norm}",
                f"model.architecture={architecture}",
            ],
        )
        for recompute, rows, (precision, norm, architecture) in itertools.product(
            ("none", "selective", "block"),
            ("false", "true"),
            (("fp32", "false", "dlcm"), ("bf16", "true", "dlcm"), ("fp32", "true", "dense")),
        )
    ]
    measured, _ = run_distributed(all_sent_by_units, SIZE, configs)
    for config, (sent, num_concepts) in zip(configs, measured, strict=True):
        assert sum(sent.values()) > 0
        for unit, found in sent.items():
            rows = num_concepts
            if config.parallel.sequence_parallel and unit.kind in ON_CONCEPTS:
                rows += rows % SIZE  # filled up to equal shards
            expected = tensor_bytes(config, unit.kind, sum(LENGTHS), rows)
            width = max(config.model.d_concept, config.model.d_token)
            assert expected == pytest.approx(found, abs=8 * width), (unit.name, config.parallel)


def all_traces(configs: list[RunConfig]) -> list[Trace]:
    return [trace(config) for config in configs]


def planned_messages(
    config: RunConfig, edges: Sequence[Edge], rows: Sequence[tuple[int, int]]
) -> Counter[str]:
    """Bytes by message of steps whose micro-batches had these tokens and concepts, by the plan."""
    chunks, parallel = make_partition(config).chunks, config.parallel
    counted = chunk_of(chunks, UnitKind.SEGMENTATION)
    assert counted is not None and counts_first(config, len(rows) // NUM_STEPS)
    planned: Counter[str] = Counter()
    for edge, row in itertools.product(edges, rows):
        if chunks[edge.source].stage == chunks[edge.target].stage:
            continue
        size = parallel.tensor_parallel_size if edge.is_sharded else 1
        filled = [number + -number % size for number in row]  # up to equal shards
        num_bytes = edge_bytes(config, edge, *map(float, filled))
        times = 2 if edge.target <= counted else 1  # once more in the pass that counts boundaries
        planned[f"{edge.source}->{edge.target} {edge.content}"] += int(times * num_bytes)
        if edge.has_gradient:
            planned[f"{edge.target}->{edge.source} gradient of {edge.content}"] += int(num_bytes)
    return planned


def check_messages(config: RunConfig, ranks: Sequence[Trace], edges: Sequence[Edge]) -> None:
    """Every message of every process is planned, to the byte, and every planned one is sent."""
    # decisions are the same in both passes, so that each micro-batch is there twice
    holder = next(rank for rank in ranks if rank.concepts)
    rows = sorted(zip(holder.tokens, holder.concepts, strict=True))[::2]
    assert 0.9 < sum(tokens for tokens, _ in rows) / (NUM_STEPS * config.step_tokens) <= 1
    planned, chunks = planned_messages(config, edges, rows), make_partition(config).chunks
    stage_of = {str(chunk.index): chunk.stage for chunk in chunks}
    num_stages, size = config.parallel.pipeline_parallel_size, config.parallel.tensor_parallel_size
    assert len(ranks) == num_stages * size
    for stage in range(num_stages):
        own = {k: n for k, n in planned.items() if stage_of[k.partition("->")[0]] == stage}
        for rank in ranks[stage * size : (stage + 1) * size]:
            assert rank.sent == own != {}
    if not config.parallel.sequence_parallel:  # the bytes are linear in tokens and concepts
        tokens, concepts = (float(sum(numbers)) for numbers in zip(*rows, strict=True))
        sent = sent_by_stage(config, chunks, edges, tokens, concepts, counts=True)
        assert sent == [sum(rank.sent.values()) for rank in ranks[::size]]


def edges_of(config: RunConfig) -> list[Edge]:
    chunks = make_partition(config).chunks
    return list(model_edges(config.model, chunks, config.parallel.sequence_parallel))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_stages_send_what_the_plan_says(tmp_path: Path, world_size: int) -> None:
    """Real steps, with concept counts that differ from micro-batch to micro-batch.

    And each edge that is listed wrongly, or not at all, is found.
    """
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    write_uneven(corpus)
    ema_ste = {"boundary_mode": "ema_ste"}
    runs: list[tuple[Layout, dict[str, Any]]] = {
        2: [
            (Layout(pipeline=2), {}),
            (Layout(pipeline=2, placement="folded", micro=2), {}),
            (Layout(pipeline=2), ema_ste),
        ],
        4: [
            (Layout(2, 2), {}),
            (Layout(2, 2, sequence=True), {}),
            (Layout(2, 2, sequence=True, placement="folded", micro=2), ema_ste),
            (Layout(pipeline=4), ema_ste),
        ],
    }[world_size]
    configs = [
        parity_run(corpus, tmp_path / "run", layout, **model | {"backbone_layers": 3})
        for layout, model in runs
    ]
    ranks = run_distributed(all_traces, world_size, configs, timeout_seconds=600)
    found = set()
    for config, *traces in zip(configs, *ranks, strict=True):
        edges = edges_of(config)
        check_messages(config, traces, edges)
        for edge, wrong in wrong_lists(config, edges):
            with pytest.raises(AssertionError):
                check_messages(config, traces, wrong)
            found.add((edge.content, edge.rows))
    hidden = {(Content.HIDDEN, Stream.TOKENS), (Content.CONFIDENCE, Stream.TOKENS)}
    assert found >= hidden | {(Content.STATES, stream) for stream in Stream}


def wrong_lists(config: RunConfig, edges: list[Edge]) -> Iterator[tuple[Edge, list[Edge]]]:
    """Lists with one mistake in an edge that crosses between stages."""
    chunks = make_partition(config).chunks
    for index, edge in enumerate(edges):
        if chunks[edge.source].stage == chunks[edge.target].stage:
            continue
        for mistake in (
            [],
            [edge, edge],
            [dataclasses.replace(edge, width=edge.width + 1)],
            [dataclasses.replace(edge, has_gradient=not edge.has_gradient)],
            [dataclasses.replace(edge, number=_OTHER_NUMBER[edge.number])],
            [dataclasses.replace(edge, rows=_OTHER_ROWS[edge.rows])],
            [dataclasses.replace(edge, is_sharded=not edge.is_sharded)]
            if config.parallel.tensor_parallel_size > 1
            else [],
        ):
            yield edge, [*edges[:index], *mistake, *edges[index + 1 :]]


_OTHER_NUMBER = {
    Number.DECISION: Number.SCORE,
    Number.SCORE: Number.DECISION,
    Number.STATE: Number.DECISION,
}
_OTHER_ROWS = {Stream.TOKENS: Stream.CONCEPTS, Stream.CONCEPTS: Stream.TOKENS}


def test_zero_sends_more_the_more_it_shares(run_file: Path) -> None:
    def sent(stage: int, *more: str) -> float:
        config = load_config(run_file, [f"parallel.zero_stage={stage}", *more])
        return data_bytes(config, own=1000.0, replicas=4, micro_batches=8)

    assert sent(0) == 3 / 4 * 1000 * 8
    assert sent(1) == 3 / 4 * 1000 * 12
    assert sent(2) == 3 / 4 * 1000 * (8 * 8 + 4)
    assert sent(3, "training.ratio_statistics=previous_step") == 3 / 4 * 1000 * 8 * (4 + 2 * 4)
    assert sent(3, "parallel.recompute=block") == 3 / 4 * 1000 * (8 * (4 + 3 * 4) + 4)
    config = load_config(run_file)
    assert data_bytes(config, own=1000.0, replicas=1, micro_batches=8) == 0.0
