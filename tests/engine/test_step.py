from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.reading.batch import StepBatch, batch_digest
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.objective import SUMS, MicroBatchResult, Objective
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import NonFiniteError, TrainStep, calibrate_boundaries
from megadlcm.model import DLCM
from tests.support import gathering as tensors
from tests.support.tiny_runs import step_loader, tiny_engine

LAYOUTS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]


def engine_after_one_step(config: RunConfig) -> tuple[TrainingEngine, TrainStep, StepBatch]:
    """An engine whose optimizer has state, and the batch of its second step."""
    engine = tiny_engine(config)
    loader = step_loader(config)
    step = TrainStep(engine, config)
    step.run(next(loader), TrainState())
    batch = next(loader)
    loader.close()
    return engine, step, batch


def everything(engine: TrainingEngine) -> dict[str, Tensor]:
    return tensors.read_model(engine) | tensors.read_optimizer(engine)


@pytest.mark.parametrize(("precision", "zero_stage"), LAYOUTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing_and_names_its_group(
    make_run: Callable[..., RunConfig], precision: str, zero_stage: int, bad: float
) -> None:
    config = make_run(training={"precision": precision}, parallel={"zero_stage": zero_stage})
    engine, step, batch = engine_after_one_step(config)
    before = everything(engine)
    weight = dict(engine.model.named_parameters())["backbone.blocks.0.feed_forward.w_up.weight"]
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, bad))
    with pytest.raises(NonFiniteError) as caught:
        step.run(batch, TrainState(step=1, consumed_samples=4))
    hook.remove()
    after = everything(engine)
    assert before.keys() == after.keys() and any("exp_avg" in name for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    message = str(caught.value)
    assert "step 2" in message and "['concept']" in message and "Samples 4..7" in message
    assert batch_digest(batch.sample_digests) in message


@pytest.mark.parametrize(("precision", "zero_stage"), LAYOUTS)
def test_a_bad_loss_changes_nothing(
    make_run: Callable[..., RunConfig],
    precision: str,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_run(training={"precision": precision}, parallel={"zero_stage": zero_stage})
    engine, step, batch = engine_after_one_step(config)
    before = everything(engine)
    exact = Objective.__call__

    def spoiled(*arguments: Any) -> MicroBatchResult:
        result = exact(*arguments)
        result.stats.sums[SUMS.index("cross_entropy")] = math.nan
        return MicroBatchResult(result.loss * math.nan, result.stats)

    monkeypatch.setattr(Objective, "__call__", spoiled)
    with pytest.raises(NonFiniteError, match="loss nan"):
        step.run(batch, TrainState(step=1))
    after = everything(engine)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_an_ordinary_step_changes_every_parameter(make_run: Callable[..., RunConfig]) -> None:
    """Guards the two tests above against passing because nothing ever changes."""
    engine, step, batch = engine_after_one_step(make_run())
    before = everything(engine)
    step.run(batch, TrainState(step=1))
    after = everything(engine)
    names = [name for name, _ in engine.model.named_parameters()]
    assert all(not torch.equal(before[name], after[name]) for name in names)


def test_calibration_gives_the_target_ratio_on_the_first_batch(
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run(training={"global_batch_size": 16})
    engine = tiny_engine(config)
    loader = step_loader(config)
    batch = next(loader)
    loader.close()
    assert isinstance(engine.model, DLCM)
    assert float(engine.model.boundary_detector.offset) == 0.0
    offset = calibrate_boundaries(engine, config, batch)
    assert offset == float(engine.model.boundary_detector.offset) != 0.0
    summary = TrainStep(engine, config).run(batch, TrainState()).summary
    target = config.model.target_tokens_per_concept
    assert summary.num_tokens / summary.num_threshold_boundaries == pytest.approx(target, rel=0.15)


def test_the_sums_of_a_step_fit_together(make_run: Callable[..., RunConfig]) -> None:
    config = make_run()
    engine = tiny_engine(config)
    loader = step_loader(config)
    batch = next(loader)
    loader.close()
    summary = TrainStep(engine, config).run(batch, TrainState()).summary
    assert summary.num_tokens == batch.num_tokens
    assert sum(summary.concept_lengths) == summary.num_boundaries
    assert 0 < summary.num_near_half <= summary.num_tokens
    pooled = sum(length * count for length, count in enumerate(summary.concept_lengths))
    assert summary.num_boundaries < pooled <= summary.num_tokens


@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "ema_ste", "rule"])
def test_the_threshold_moves_after_each_step(make_run: Callable[..., RunConfig], mode: str) -> None:
    config = make_run(model={"boundary_mode": mode})
    engine, step, batch = engine_after_one_step(config)
    assert isinstance(engine.model, DLCM)
    threshold = float(engine.model.boundary_detector.threshold)
    step.run(batch, TrainState(step=1))
    assert threshold != 0.5 and float(engine.model.boundary_detector.threshold) != threshold


@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "ema_ste"])
def test_training_does_not_know_whether_the_threshold_is_tracked(
    make_run: Callable[..., RunConfig], mode: str
) -> None:
    """Bit for bit; only the threshold and what it would decide differ."""
    results, tensors_after = [], []
    for tracked in (True, False):
        model = {"boundary_mode": mode, "track_threshold": tracked}
        engine, step, batch = engine_after_one_step(make_run(f"tracked_{tracked}", model=model))
        results.append(step.run(batch, TrainState(step=1)).summary)
        tensors_after.append(everything(engine))
    first, second = results
    assert first.num_threshold_boundaries != second.num_threshold_boundaries
    assert replace(first, num_threshold_boundaries=0) == replace(second, num_threshold_boundaries=0)
    left, right = tensors_after
    unequal = [name for name in left if not torch.equal(left[name], right[name])]
    assert unequal == ["boundary_detector.threshold"]


@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "rule", "fixed", "ema_ste"])
def test_samples_of_one_token_train(make_run: Callable[..., RunConfig], mode: str) -> None:
    """No token has a predecessor: nothing to calibrate, to steer and to track."""
    config = make_run(data={"seq_len": 1}, model={"boundary_mode": mode})
    engine = tiny_engine(config)
    loader = step_loader(config)
    batch = next(loader)
    loader.close()
    before = everything(engine)
    assert calibrate_boundaries(engine, config, batch) is None
    summary = TrainStep(engine, config).run(batch, TrainState()).summary
    assert summary.num_boundaries == summary.num_tokens == batch.num_tokens > 0
    assert math.isfinite(summary.loss)
    after = everything(engine)
    kept = ("boundary_detector.offset", "boundary_detector.threshold")
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "rule", "ema_ste", "fixed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_states_are_reported_as_such_in_every_mode(
    make_run: Callable[..., RunConfig], mode: str, bad: float
) -> None:
    """Not by the first operation that cannot take them, while other ranks wait for this one."""
    engine, step, batch = engine_after_one_step(make_run(model={"boundary_mode": mode}))
    before = everything(engine)
    assert isinstance(engine.model, DLCM)
    norm = engine.model.encoder.norm
    assert norm is not None
    hook = norm.register_forward_hook(lambda module, inputs, output: output * bad)
    with pytest.raises(NonFiniteError, match="loss nan"):
        step.run(batch, TrainState(step=1))
    hook.remove()
    after = everything(engine)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def detector_after_two_steps(config: RunConfig) -> tuple[Tensor, list[float]]:
    """How far W_q has moved, and the rates of the two steps."""
    engine, state, rates = tiny_engine(config), TrainState(), []
    assert isinstance(engine.model, DLCM)
    engine.model.boundary_detector.offset.fill_(0.3)  # far from the target: both steps are large
    loader, step = step_loader(config), TrainStep(engine, config)
    for _ in range(2):
        step.run(next(loader), state)
        state.step += 1
        rates += [g["lr"] for g in engine.optimizer.param_groups if g["steered"]]
    loader.close()
    moved = tensors.read_model(engine)["boundary_detector.w_q.weight"]
    return moved - torch.eye(len(moved)), rates


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize(("zero_stage", "micro"), [(0, 4), (0, 1), (1, 2), (2, 1), (1, 4)])
def test_the_steered_detector_moves_alike_however_the_step_is_cut_and_clipped(
    make_run: Callable[..., RunConfig], zero_stage: int, micro: int, max_grad_norm: float
) -> None:
    def config(name: str, zero_stage: int, micro: int, max_grad_norm: float) -> RunConfig:
        return make_run(
            name,
            parallel={"zero_stage": zero_stage},
            training={"micro_batch_size": micro, "max_grad_norm": max_grad_norm},
            # the other parameters would differ by what clipping does to them
            optimizer={"learning_rate": 1e-9},
        )

    moved, rates = detector_after_two_steps(config("cut", zero_stage, micro, max_grad_norm))
    whole, _ = detector_after_two_steps(config("whole", 0, 4, 0.0))
    assert float((moved - whole).norm() / whole.norm()) < 1e-3
    assert float(whole.norm()) > 0.01 and min(rates) > 0.0
