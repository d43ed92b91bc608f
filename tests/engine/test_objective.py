"""The gradient of a step is that of the whole batch, however the batch is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.objective import MicroBatchResult, Objective, StepTotals
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import StepResult, TrainStep, to_device
from megadlcm.model import DLCM, build_model
from megadlcm.model.output import ModelOutput
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.compression import ratio_loss
from megadlcm.ops.cross_entropy import token_cross_entropy
from tests.support.tiny_runs import step_loader, tiny_engine

RATIO_WEIGHT = 3.0  # far above the usual 0.03, so that a wrong ratio gradient is not lost in noise


def sgd_run(make_run: Callable[..., RunConfig], corpus: Path, micro: int, **keys: str) -> RunConfig:
    """One step of plain SGD on the four windows of `short`, one of which is not full."""
    zero_stage = int(keys.pop("zero_stage", "1"))
    return make_run(
        model={"boundary_mode": keys.pop("boundary_mode", "learned_global")},
        data={"train": [{"path": str(corpus / "short"), "name": "short"}]},
        parallel={"zero_stage": zero_stage},
        training={
            "global_batch_size": 4,
            "micro_batch_size": micro,
            "max_grad_norm": 0.0,
            "ratio_loss_weight": RATIO_WEIGHT,
            **keys,
        },
        # a rate so large that the difference of the parameters does not lose the gradient's digits
        optimizer={
            "name": "sgd",
            "learning_rate": 1e3,
            "boundary_learning_rate": 1e3,
            "weight_decay": 0.0,
        },
    )


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


def reference_gradients(config: RunConfig) -> tuple[dict[str, Tensor], float, float]:
    """Gradient of the mean loss over the whole batch, written down once more, in fp64."""
    model = build_model(config.model, config.mup, seed=config.seed).double()
    assert isinstance(model, DLCM)
    loader = step_loader(config)
    batch = next(loader)
    loader.close()
    parts = [to_device(packed, config, 0, torch.device("cpu")) for packed in batch.micro_batches]
    tokens_T = torch.cat([part.tokens_T for part in parts])
    index_T = torch.cat([part.sampling.token_index_T for part in parts])
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    output = model(tokens_T, cu_seqlens, BoundarySampling(config.seed, 0, index_T))
    labels_T = torch.cat([part.labels_T for part in parts])
    loss = token_cross_entropy(output.logits_TV, labels_T).mean()
    assert output.boundary is not None
    prob_T, mask_T = output.boundary.prob_T, output.boundary.mask_T.double()
    target = config.model.target_tokens_per_concept
    if config.model.boundary_mode == "learned_global":
        ratio = ratio_loss(mask_T.mean(), prob_T.mean(), target)
    else:  # one ratio loss for each document, weighted by its tokens
        bounds = cu_seqlens.tolist()
        ratio = sum(
            ratio_loss(mask_T[a:b].mean(), prob_T[a:b].mean(), target) * (b - a)
            for a, b in itertools.pairwise(bounds)
        ) / len(tokens_T)
    (loss + RATIO_WEIGHT * ratio).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, float(loss.detach()), float(mask_T.mean())


def worst_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of any parameter's gradient."""
    return max(
        float((gradients[name] - value).norm() / value.norm().clamp(min=1e-5))
        for name, value in expected.items()
    )


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
