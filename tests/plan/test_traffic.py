"""What a plan says is sent is what processes send, byte for byte."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadlcm.config import RunConfig, load_config
from megadlcm.model.units import run_units, start_flow
from megadlcm.parallel.partition import build_stage_model, make_partition
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.stages import model_units
from megadlcm.plan.traffic import (
    counts_first,
    data_bytes,
    pipeline_edges,
    sent_by_stage,
    tensor_bytes,
)
from tests.support.distributed import run_distributed
from tests.support.memory_probe import probe_batch, probe_model
from tests.support.parity import NUM_STEPS, Layout, Trace, parity_run, trace, write_uneven
from tests.support.tiny_runs import write_corpus

LENGTHS = [64, 7, 41]
SIZE = 2


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


def sent_by_units(config: RunConfig) -> tuple[dict[str, float], int]:
    """Bytes of forward and backward pass of each unit alone; and the concepts."""
    model = build_stage_model(config, join_process_group(config.parallel))
    model, batch = probe_model(config, model), probe_batch(config, LENGTHS)
    flow, sent, num_concepts = start_flow(model, batch), {}, 0
    for unit in model_units(config.model, config.data.seq_len):
        leaves = []
        for name in ("states", "hidden_TD"):
            tensor = getattr(flow, name)
            if tensor is not None:
                leaves.append(tensor.detach().requires_grad_())
                setattr(flow, name, leaves[-1])
        with counted() as bytes_of_unit:
            run_units(model, [unit.name], flow)
            results = [flow.states, flow.hidden_TD]
            if unit.name == "lm_head":
                results = [flow.output.token_losses(batch.tokens_T)]
            roots = [r for r in results if r is not None and r.grad_fn is not None]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        sent[unit.name] = bytes_of_unit[0]
        num_concepts = flow.layout.num_concepts if flow.layout else 0
    return sent, num_concepts


def all_sent_by_units(configs: list[RunConfig]) -> list[tuple[dict[str, float], int]]:
    return [sent_by_units(config) for config in configs]


def test_layers_send_what_the_formula_says(run_file: Path) -> None:
    """Every kind of unit, all kinds of recomputation, whole and cut rows."""
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
            if config.parallel.sequence_parallel and unit.startswith(
                ("backbone", "concept", "seg")
            ):
                rows += rows % SIZE  # filled up to equal parts
            expected = tensor_bytes(config, unit, sum(LENGTHS), rows)
            width = max(config.model.d_concept, config.model.d_token)
            assert expected == pytest.approx(found, abs=8 * width), (unit, config.parallel)


def all_traces(configs: list[RunConfig]) -> list[Trace]:
    return [trace(config) for config in configs]


@pytest.mark.slow
def test_stages_send_what_the_formula_says(tmp_path: Path) -> None:
    """Real steps on two stages, with concept counts that differ from micro-batch to micro-batch.

    The bytes are linear in tokens and concepts, so that their sums over the steps decide.
    """
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    write_uneven(corpus)
    layouts = [Layout(pipeline=2), Layout(pipeline=2, placement="folded", micro=2)]
    models: list[dict[str, Any]] = [{}, {}, {"boundary_mode": "ema_ste"}]
    configs = [
        parity_run(corpus, tmp_path / "run", layout, **model)
        for layout, model in zip([*layouts, layouts[0]], models, strict=True)
    ]
    for config, *ranks in zip(configs, *run_distributed(all_traces, SIZE, configs), strict=True):
        chunks = make_partition(config).chunks
        micro_batches = config.training.gradient_accumulation_steps(1)
        num_concepts = max(sum(rank.concepts) for rank in ranks)
        decisions = [n for r in ranks for key, n in r.sent.items() if key.endswith("decisions")]
        num_tokens = max(decisions)  # a byte each; packing leaves some places free
        assert 0.9 < num_tokens / (NUM_STEPS * config.step_tokens) <= 1
        assert counts_first(config, micro_batches)
        num_concepts //= 2  # counted in the pass that counts as well
        edges = pipeline_edges(config, chunks, num_tokens, num_concepts)
        sent = sent_by_stage(edges, SIZE)
        before = next(c.index for c in chunks if "segmentation" in c.names)
        for edge in edges[:before]:
            sent[edge.source] += edge.forward
        for stage, found in enumerate(ranks):
            assert sent[stage] == sum(found.sent.values()) > 0


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
