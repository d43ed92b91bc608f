"""The gradient of a step is that of the whole batch, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.objective import MicroBatchResult, Objective, StepTotals
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import StepResult, TrainStep
from megadlcm.model.output import ModelOutput
from tests.support.gradients import reference_gradients, sgd_run, worst_error
from tests.support.tiny_runs import step_loader, tiny_engine


def one_step(config: RunConfig) -> tuple[TrainingEngine, dict[str, Tensor], StepResult]:
    """Runs a step; SGD's difference of the parameters over the rate is the gradient."""
    engine = tiny_engine(config)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    loader = step_loader(config)
    result = TrainStep(engine, config).run(next(loader), TrainState())
    loader.close()
    rates = {
        id(p): group["lr"]
        for group, members in zip(engine.optimizer.param_groups, _members(engine), strict=True)
        for p in members
    }
    gradients = {
        name: (before[name] - p.detach()).double() / rates[id(p)]
        for name, p in engine.model.named_parameters()
    }
    return engine, gradients, result


def _members(engine: TrainingEngine) -> list[list[Tensor]]:
    zero = engine.zero_optimizer
    if zero is None:
        return [group["params"] for group in engine.optimizer.param_groups]
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    return [list(members) for members in groups]


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("boundary_mode", ["learned_global", "learned_local"])
@pytest.mark.parametrize("zero_stage", ["0", "1", "2"])
def test_any_split_into_micro_batches_gives_the_gradient_of_the_whole_batch(
    make_run: Callable[..., RunConfig],
    corpus: Path,
    micro: int,
    boundary_mode: str,
    zero_stage: str,
) -> None:
    config = sgd_run(make_run, corpus, micro, boundary_mode=boundary_mode, zero_stage=zero_stage)
    expected, loss, fraction = reference_gradients(config)
    _, gradients, result = one_step(config)
    assert worst_error(gradients, expected) < 2e-5
    assert result.summary.loss == pytest.approx(loss, rel=1e-6)
    assert result.summary.boundary_fraction == pytest.approx(fraction, rel=1e-12)
    assert result.summary.num_tokens < 4 * config.data.seq_len  # one window is not full


def test_means_over_micro_batches_are_not_the_mean_over_the_batch(
    make_run: Callable[..., RunConfig], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the usual loss, a mean over each micro-batch, misses the reference."""
    exact = Objective.__call__

    def per_micro_batch(
        self: Objective, output: ModelOutput, labels_T: Tensor, totals: StepTotals
    ) -> MicroBatchResult:
        own = StepTotals(labels_T.numel(), None)
        return exact(self, output, labels_T, own)

    config = sgd_run(make_run, corpus, micro=1)
    expected, _, _ = reference_gradients(config)
    _, gradients, _ = one_step(config)
    assert worst_error(gradients, expected) < 2e-5
    monkeypatch.setattr(Objective, "__call__", per_micro_batch)
    _, gradients, _ = one_step(config)
    assert worst_error(gradients, expected) > 1e-2


def test_bf16_accumulates_each_micro_batch_once(
    make_run: Callable[..., RunConfig], corpus: Path
) -> None:
    """DeepSpeed has lost and doubled micro-batches in bf16; the norm shows either."""
    norms = []
    for micro in (1, 2, 4):
        config = sgd_run(make_run, corpus, micro, precision="bf16")
        norms.append(one_step(config)[2].grad_norm)
    assert max(norms) / min(norms) < 1.02


def test_previous_step_statistics_use_the_fraction_that_the_state_carries(
    make_run: Callable[..., RunConfig], corpus: Path
) -> None:
    config = sgd_run(make_run, corpus, micro=2, ratio_statistics="previous_step")
    gradients = []
    for fraction in (0.25, 0.9):  # 0.25 is the target: no ratio gradient at all
        engine = tiny_engine(config)
        name = "boundary_detector.w_q.weight"
        weight = dict(engine.model.named_parameters())[name]
        before = weight.detach().clone()
        loader = step_loader(config)
        state = TrainState(previous_boundary_fraction=fraction)
        TrainStep(engine, config).run(next(loader), state)
        loader.close()
        gradients.append(float((weight.detach() - before).norm()))
    assert gradients[0] == 0.0 and gradients[1] > 0.0
