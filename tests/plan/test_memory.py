"""Memory of a process: ZeRO divides what it should, chunks add up, and a real process agrees."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest

from megadlcm.config import RunConfig, load_config
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import TrainStep
from megadlcm.parallel.partition import make_partition, shard_dimension
from megadlcm.plan.accounting import count_parameters
from megadlcm.plan.edges import model_edges
from megadlcm.plan.memory import (
    HeldChunk,
    activation_bytes,
    estimate_memory,
    held_chunks,
    whole_parameters,
)
from megadlcm.plan.stages import cut_chunks, model_units
from megadlcm.training.replica_loader import open_loader
from tests.support.distributed import run_distributed
from tests.support.tiny_runs import tiny_engine, tiny_run, write_corpus

PROCESS_TOLERANCE = 0.1


def test_recomputation_keeps_less_and_more_concepts_keep_more(run_file: Path) -> None:
    def kept(recompute: str, num_concepts: int) -> float:
        overrides = ["model.encoder_layers=8", f"parallel.recompute={recompute}"]
        return activation_bytes(load_config(run_file, overrides), 1024, num_concepts)

    assert kept("block", 256) < kept("selective", 256) < kept("none", 256) < kept("none", 1024)


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(0, (4, 4, 8)), (1, (4, 4, 3)), (2, (4, 1, 3)), (3, (1, 1, 3))],
)
def test_each_zero_stage_divides_one_more_part(
    run_file: Path, stage: int, bytes_per_parameter: tuple[int, int, int]
) -> None:
    config = load_config(run_file, [f"parallel.zero_stage={stage}"])
    memory = estimate_memory(config, data_parallel_size=4)
    num_parameters = count_parameters(config.model)["total"]
    found = (memory.parameters, memory.gradients, memory.optimizer)
    assert found == tuple(num_parameters * size for size in bytes_per_parameter)
    assert (memory.buffers > 0) == (stage >= 2)


def test_half_precision_halves_the_weights_and_sgd_keeps_no_moments(run_file: Path) -> None:
    config = load_config(run_file, ["training.precision=bf16", "optimizer.name=sgd"])
    memory = estimate_memory(config, data_parallel_size=1)
    num_parameters = count_parameters(config.model)["total"]
    assert (memory.parameters, memory.optimizer) == (2 * num_parameters, 4 * num_parameters)
    assert memory.total_worst > memory.total


@pytest.mark.parametrize("placement", ["linear", "folded"])
def test_stages_hold_the_model_between_them(run_file: Path, placement: str) -> None:
    """And each chunk's activations as often as it has micro-batches in flight."""
    config = load_config(run_file, ["training.precision=bf16"])
    chunks = cut_chunks(config.model, config.data.seq_len, 2, placement)

    edges = model_edges(config.model, chunks, sequence_parallel=False)

    def of_stage(stage: int, in_flight: int) -> list[HeldChunk]:
        own = sum(chunk.stage == stage for chunk in chunks)
        return held_chunks(chunks, edges, stage, [in_flight] * own)

    stages = [estimate_memory(config, 1, of_stage(stage, 1)) for stage in (0, 1)]
    whole = estimate_memory(config, 1)
    assert sum(stage.parameters for stage in stages) == whole.parameters
    # states are kept on both sides of a cut
    assert sum(stage.activations for stage in stages) > whole.activations
    one, two, three = (estimate_memory(config, 1, of_stage(0, n)).activations for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert two > 1.5 * one


@pytest.mark.parametrize("architecture", ["dlcm", "dense"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("mode", ["learned_global", "rule"])
def test_whole_parameters_are_those_that_the_page_does_not_shard(
    run_file: Path, architecture: str, qk_norm: bool, mode: str
) -> None:
    config = load_config(run_file)
    options = {
        "architecture": architecture,
        "self_attention_qk_norm": qk_norm,
        "boundary_mode": mode,
        "segment_align": "start_shift",
    }
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **options))
    specs = [spec for spec in make_partition(config).specs.values() if spec.is_parameter]
    for unit in model_units(config.model, config.data.seq_len):
        own = [
            spec.shape.numel()
            for spec in specs
            if any(spec.name.startswith(f"{prefix}.") for prefix in unit.modules)
            and shard_dimension(spec.name) is None
        ]
        assert whole_parameters(config.model, unit.kind) == sum(own), unit.name


def resident_bytes(field: str) -> int:
    """A line of this process's status: `VmRSS` now, `VmHWM` the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def peak_of_second_step(warm_up: RunConfig, config: RunConfig) -> tuple[int, int]:
    """Most memory of a step beyond what the process had before the engine; and the concepts."""
    engine = tiny_engine(warm_up)
    TrainStep(engine, warm_up).run(next(open_loader(warm_up, engine.mesh)), TrainState())
    del engine
    gc.collect()
    before = resident_bytes("VmRSS")
    engine, state = tiny_engine(config), TrainState()
    loader, step = open_loader(config, engine.mesh), TrainStep(engine, config)
    concepts: list[int] = []
    engine.model.boundary_detector.register_forward_hook(
        lambda _module, _inputs, output: concepts.append(int(output.mask_T.sum()))
    )
    step.run(next(loader), state)
    concepts.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    step.run(next(loader), state)
    return resident_bytes("VmHWM") - before, max(concepts)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs; run on Linux"
)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_real_step_takes_as_much_as_the_formula_says(
    tmp_path: Path, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, because products in bf16 take room of their own inside the CPU's library; with two
    micro-batches, because gradients of a single one are made while activations are freed.
    """
    for threshold in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(threshold, "65536")  # freed memory goes back at once
    corpus = write_corpus(tmp_path)
    model = {
        "vocab_size": 2048,
        "d_token": 256,
        "d_concept": 512,
        "encoder_layers": 2,
        "backbone_layers": 4,
        "decoder_layers": 2,
        "token_heads": 4,
        "token_kv_heads": 2,
        "concept_heads": 8,
        "concept_kv_heads": 4,
        "token_ffn_size": 1024,
        "concept_ffn_size": 1024,
    }
    config = tiny_run(
        corpus,
        tmp_path / "run",
        model=model,
        data={"seq_len": 256},
        parallel={"zero_stage": 0, "recompute": recompute},
        training={"micro_batch_size": 8, "global_batch_size": 16},
    )
    ((peak, num_concepts),) = run_distributed(
        peak_of_second_step, 1, tiny_run(corpus, tmp_path / "warm"), config, fresh=True
    )
    memory = estimate_memory(config, 1, on_gpu=False)
    activations = activation_bytes(config, 8 * 256, num_concepts, on_gpu=False)
    expected = memory.total - memory.activations + activations
    print(f"{recompute}: {peak / 1e6:.0f} MB, by formula {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(peak, rel=PROCESS_TOLERANCE)
    assert activations > PROCESS_TOLERANCE * expected  # they would be missed
