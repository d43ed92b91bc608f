"""What ranks do in a parallel test: a step, a start, an evaluation, on the layout of a config.

Every function is collective and runs in a single process too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.checkpoint.resume import fresh_state, resume
from megadlcm.config import RunConfig
from megadlcm.engine import engine as engine_module
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.objective import MicroBatchResult, Objective, StepTotals
from megadlcm.engine.optimizer import parameter_groups
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import NonFiniteError, StepResult, TrainStep, global_batch_digest
from megadlcm.inference.evaluation import Evaluator
from megadlcm.model import build_model
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.ops.packing import Packing
from megadlcm.parallel.process_group import join_process_group
from megadlcm.training import pretrain
from megadlcm.training.checks import check_training_sources
from megadlcm.training.replica_loader import open_loader
from tests.support import gathering as tensors
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine

SAVED_STEPS = 2


@dataclass(frozen=True)
class LayoutStep:
    """What one step did."""

    loss: float
    digest: str
    grad_norm: float
    group_grad_norms: dict[str, float]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Only for SGD, and only on rank 0."""


@dataclass(frozen=True)
class Start:
    """What a start read from its run folder, and its next step."""

    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    next_step: LayoutStep


def run_steps(
    engine: TrainingEngine, config: RunConfig, state: TrainState, count: int
) -> list[LayoutStep]:
    """Runs steps as the trainer does, apart from schedule and calibration."""
    step, steps = TrainStep(engine, config), []
    with contextlib.closing(open_loader(config, engine.mesh, state)) as loader:
        for _ in range(count):
            batch = next(loader)
            result = step.run(batch, state)
            steps.append(_layout_step(result, global_batch_digest(engine, batch)))
            state.step += 1
            state.consumed_samples += config.training.global_batch_size
            state.consumed_tokens += int(result.summary.num_tokens)
            state.previous_boundary_fraction = result.summary.boundary_fraction
    return steps


def _layout_step(result: StepResult, digest: str) -> LayoutStep:
    return LayoutStep(result.summary.loss, digest, result.grad_norm, result.group_grad_norms)


@contextlib.contextmanager
def no_parameter_is_too_small_to_be_partitioned() -> Iterator[None]:
    """DeepSpeed's stage 3 keeps small parameters whole; in a tiny model that would be all."""
    exact = engine_module.deepspeed_dictionary

    def with_threshold(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
        values = exact(config, data_parallel_size)
        if config.parallel.zero_stage == 3:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "deepspeed_dictionary", with_threshold)
        yield


def sgd_steps(configs: Sequence[RunConfig]) -> list[LayoutStep]:
    """One step of plain SGD for each config: parameter difference over rate is the gradient."""
    with no_parameter_is_too_small_to_be_partitioned():
        return [_sgd_step(config) for config in configs]


def _sgd_step(config: RunConfig) -> LayoutStep:
    engine = tiny_engine(config)
    before = tensors.read_model(engine)
    (step,) = run_steps(engine, config, TrainState(), 1)
    whole = [p for p in engine.model.parameters() if p.numel()]
    assert bool(whole) == (config.parallel.zero_stage < 3)  # stage 3 has really scattered them
    after = tensors.read_model(engine)
    rates = learning_rates_by_name(config)
    gradients = {
        name: (before[name] - after[name]).double() / rate
        for name, rate in rates.items()
        if engine.mesh.is_writer
    }
    return LayoutStep(step.loss, step.digest, step.grad_norm, step.group_grad_norms, gradients)


def learning_rates_by_name(config: RunConfig) -> dict[str, float]:
    """Learning rate of each parameter."""
    model = build_model(config.model, config.mup)
    groups = parameter_groups(model, config)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters()}


def local_fraction_step(config: RunConfig) -> LayoutStep:
    """The mistake to guard against: each rank steers by the boundary fraction of its own tokens."""
    exact = Objective.ratio_loss

    def local(
        self: Objective, boundary: BoundaryOutput, packing: Packing, totals: StepTotals
    ) -> Tensor | None:
        fraction = boundary.mask_T.double().mean()
        return exact(self, boundary, packing, StepTotals(totals.num_tokens, fraction))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "ratio_loss", local)
        return _sgd_step(config)


def bad_loss_on_the_last_rank(config: RunConfig) -> tuple[str, list[str]]:
    """The error of this rank, and the tensors that the refused step changed nevertheless."""
    engine = tiny_engine(config)
    state = TrainState()
    run_steps(engine, config, state, 1)
    before = tensors.read_model(engine) | tensors.read_optimizer(engine)
    exact, last = Objective.__call__, engine.mesh.rank == engine.mesh.world_size - 1

    def spoiled(*arguments: Any) -> MicroBatchResult:
        result = exact(*arguments)
        if last:
            result.stats.sums[0] = math.nan
            result = MicroBatchResult(result.loss * math.nan, result.stats)
        return result

    message = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", spoiled)
        try:
            run_steps(engine, config, state, 1)
        except NonFiniteError as error:
            message = str(error)
    after = tensors.read_model(engine) | tensors.read_optimizer(engine)
    return message, [name for name in before if not torch.equal(before[name], after[name])]


def save_and_go_on(config: RunConfig) -> LayoutStep:
    """Saves a checkpoint after `SAVED_STEPS` steps; the step after it, uninterrupted."""
    engine, state = tiny_engine(config), fresh_state(config)
    run_steps(engine, config, state, SAVED_STEPS)
    save_checkpoint(engine, config, state)
    return run_steps(engine, config, state, 1)[0]


def start_again(config: RunConfig) -> Start:
    """Resumes from the run folder; tensors are on rank 0 only."""
    engine = tiny_engine(config)
    state = resume(engine, config)
    assert state is not None
    model, optimizer = tensors.read_model(engine), tensors.read_optimizer(engine)
    resumed = TrainState.from_dict(state.to_dict())
    return Start(resumed, model, optimizer, run_steps(engine, config, state, 1)[0])


def evaluation_row(config: RunConfig) -> dict[str, Any]:
    """The evaluation of the fresh model of a run."""
    engine = tiny_engine(config)
    eos_id = check_training_sources(config).tokenizer.eos_id
    evaluator = Evaluator(config, engine.mesh, eos_id)
    with engine.whole_model() as model:
        return evaluator.run(model, engine.pipeline.outputs)


@dataclass(frozen=True)
class Checks:
    """The configs of one launch."""

    sgd: list[RunConfig]
    control: RunConfig
    bad_loss: list[RunConfig]
    evaluation: list[RunConfig]
    saving: list[RunConfig]
    starting: list[RunConfig]
    run: RunConfig


@dataclass(frozen=True)
class Results:
    """The same for what came of them on one rank."""

    world_size: int
    sgd: list[LayoutStep]
    control: LayoutStep
    bad_loss: list[tuple[str, list[str]]]
    evaluation: list[dict[str, Any]]
    saving: list[LayoutStep]
    starting: list[Start]
    exit_code: int


def run_checks(checks: Checks) -> Results:
    """Everything that is to be checked on one number of ranks, because launches are slow."""
    with no_parameter_is_too_small_to_be_partitioned():
        return Results(
            world_size=join_process_group().world_size,
            sgd=sgd_steps(checks.sgd),
            control=local_fraction_step(checks.control),
            bad_loss=[bad_loss_on_the_last_rank(config) for config in checks.bad_loss],
            evaluation=[evaluation_row(config) for config in checks.evaluation],
            saving=[save_and_go_on(config) for config in checks.saving],
            starting=[start_again(config) for config in checks.starting],
            exit_code=pretrain.run(checks.run),
        )
