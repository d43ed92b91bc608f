"""One optimizer step: micro-batches in, sums out; nothing is applied if anything is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from data_pipeline.batch import PackedBatch, StepBatch, batch_digest
from megadlcm.config import RunConfig
from megadlcm.model import DLCM
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.training.engine import TrainingEngine
from megadlcm.training.objective import (
    NUM_SUMS,
    DeviceBatch,
    MicroBatchResult,
    Objective,
    StepStats,
    StepSummary,
    StepTotals,
)
from megadlcm.training.ratio_control import RatioController
from megadlcm.training.state import TrainState


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the step was not applied."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    summary: StepSummary
    """Sums over the step's tokens."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    group_grad_norms: dict[str, float]
    """The same for each muP group."""


def to_device(
    batch: PackedBatch, config: RunConfig, step: int, device: torch.device
) -> DeviceBatch:
    """Moves a micro-batch to the device.

    Args:
        batch: the packed micro-batch.
        config: the run; its seed names the random draws.
        step: completed optimizer steps.
        device: where to.

    Returns:
        The same as tensors.
    """
    token_index_T = torch.from_numpy(batch.token_index_T).to(device, non_blocking=True)
    return DeviceBatch(
        torch.from_numpy(batch.tokens_T).to(device, non_blocking=True),
        torch.from_numpy(batch.labels_T).to(device, non_blocking=True),
        torch.from_numpy(batch.cu_seqlens).to(device, non_blocking=True),
        BoundarySampling(config.seed, step, token_index_T),
    )


def global_batch_digest(engine: TrainingEngine, batch: StepBatch) -> str:
    """Digest of sample ids and tokens of the global batch, the same for every layout."""
    gathered = engine.mesh.gather_objects(tuple(batch.sample_digests))
    return batch_digest([digest for digests in gathered for digest in digests])


@torch.no_grad()
def calibrate_boundaries(engine: TrainingEngine, config: RunConfig, batch: StepBatch) -> float:
    """Sets the detector's offset from the cosines of a whole global batch; once in a fresh run.

    Args:
        engine: the engine.
        config: the run.
        batch: this replica's share of the batch.

    Returns:
        The offset.
    """
    cosines = []
    with engine.whole_model() as model:
        assert isinstance(model, DLCM)
        for packed in batch.micro_batches:
            on_device = to_device(packed, config, 0, engine.mesh.device)
            output = model.boundaries(on_device.tokens_T, on_device.cu_seqlens, on_device.sampling)
            inner_T = torch.ones_like(on_device.tokens_T, dtype=torch.bool)
            inner_T[on_device.cu_seqlens[:-1].long()] = False  # those have no predecessor
            cosines.append(output.cosine_T[inner_T].cpu())
    everywhere = engine.mesh.gather_objects(torch.cat(cosines).numpy())
    cosine = torch.cat([torch.from_numpy(part) for part in everywhere])
    model.boundary_detector.calibrate(cosine)
    return float(model.boundary_detector.offset)


class TrainStep:
    """Runs optimizer steps.

    Args:
        engine: the engine.
        config: the run.
    """

    def __init__(self, engine: TrainingEngine, config: RunConfig) -> None:
        self.engine = engine
        self.config = config
        self.objective: Objective = engine.deepspeed.module.objective
        self.controller = RatioController(config)

    def run(self, batch: StepBatch, state: TrainState) -> StepResult:
        """Runs one step: forward and backward for each micro-batch, audit, update.

        Args:
            batch: this replica's share of the global batch.
            state: counters, which are only read, and averages of the ratio controller.

        Returns:
            Sums and gradient norms.

        Raises:
            NonFiniteError: the loss or a gradient is not finite; nothing was applied.
        """
        mesh, deepspeed = self.engine.mesh, self.engine.deepspeed
        micro_batches = [
            to_device(packed, self.config, state.step, mesh.device)
            for packed in batch.micro_batches
        ]
        totals = self._totals(micro_batches, state)
        stats: StepStats | None = None
        result: StepResult | None = None
        for index, micro_batch in enumerate(micro_batches):
            output: MicroBatchResult = deepspeed(micro_batch, totals)
            deepspeed.backward(output.loss)
            stats = output.stats if stats is None else stats.add_(output.stats)
            if index == len(micro_batches) - 1:
                result = self._audit(stats, batch, state)
                self._steer(result, stats, totals, state)
            deepspeed.step()
        assert result is not None and stats is not None
        if not deepspeed.was_step_applied():
            raise NonFiniteError(self._message("DeepSpeed skipped the step", batch, state))
        self._track_threshold(stats)
        return result

    def _totals(self, micro_batches: list[DeviceBatch], state: TrainState) -> StepTotals:
        mesh = self.engine.mesh
        counts = torch.tensor(
            [float(sum(batch.tokens_T.numel() for batch in micro_batches)), 0.0],
            dtype=torch.float64,
        )
        if not self.objective.needs_boundary_fraction:
            return StepTotals(int(mesh.sum_over_data_parallel(counts)[0]), None)
        previous = state.previous_boundary_fraction
        if self.config.training.ratio_statistics == "previous_step" and previous is not None:
            num_tokens = int(mesh.sum_over_data_parallel(counts)[0])
            return StepTotals(num_tokens, torch.tensor(previous, dtype=torch.float64))
        if len(micro_batches) == 1:  # the forward pass itself will know F
            return StepTotals(int(mesh.sum_over_data_parallel(counts)[0]), None)
        counts[1] = self._count_boundaries(micro_batches)
        num_tokens_sum, boundaries = mesh.sum_over_data_parallel(counts).tolist()
        fraction = torch.tensor(boundaries / num_tokens_sum, dtype=torch.float64)
        return StepTotals(int(num_tokens_sum), fraction)

    @torch.no_grad()
    def _count_boundaries(self, micro_batches: list[DeviceBatch]) -> float:
        """Boundaries of this replica's share, which the draws below will repeat exactly."""
        total = torch.zeros((), dtype=torch.float64, device=self.engine.mesh.device)
        with self.engine.whole_model() as model:
            assert isinstance(model, DLCM)
            for batch in micro_batches:
                output = model.boundaries(batch.tokens_T, batch.cu_seqlens, batch.sampling)
                total += output.mask_T.sum()
        return float(total)

    def _audit(self, stats: StepStats, batch: StepBatch, state: TrainState) -> StepResult:
        """Copies sums and gradient norms to the host, once, and stops what is not finite.

        This runs before the optimizer: DeepSpeed's stages update one parameter group after the
        other, so a hook on the optimizer would see the last group after the first was changed.
        """
        mesh = self.engine.mesh
        squares = self.engine.gradient_square_sums()
        numbers = mesh.sum_over_data_parallel(torch.cat([stats.sums, squares])).tolist()
        if stats.prob_histogram is not None:
            mesh.sum_over_data_parallel(stats.prob_histogram)
        summary = StepSummary.from_sums(numbers[:NUM_SUMS])
        group_squares = numbers[NUM_SUMS:]
        if not math.isfinite(summary.cross_entropy + sum(group_squares)):
            groups = [
                group
                for group, square in zip(self.engine.mup_groups, group_squares, strict=True)
                if not math.isfinite(square)
            ]
            problem = (
                f"loss {summary.loss}, non-finite gradients in {sorted(set(groups)) or 'none'}"
            )
            raise NonFiniteError(self._message(problem, batch, state))
        by_group: dict[str, float] = {}
        for group, square in zip(self.engine.mup_groups, group_squares, strict=True):
            by_group[group] = by_group.get(group, 0.0) + square
        norms = {group: math.sqrt(square) for group, square in by_group.items()}
        return StepResult(summary, math.sqrt(sum(group_squares)), norms)

    def _steer(
        self, result: StepResult, stats: StepStats, totals: StepTotals, state: TrainState
    ) -> None:
        """Sets the rate with which this step's ratio loss moves the boundary detector."""
        used = totals.boundary_fraction
        fraction = result.summary.boundary_fraction if used is None else float(used)
        for group in self.engine.optimizer.param_groups:
            if group["steered"]:
                assert stats.prob_histogram is not None
                rate = self.controller.step_size(
                    fraction, stats.prob_histogram.cpu(), result.group_grad_norms["boundary"], state
                )
                group["lr"] = self.controller.adamw_rate(rate, result.grad_norm)

    def _message(self, problem: str, batch: StepBatch, state: TrainState) -> str:
        own = [sample for packed in batch.micro_batches for sample in packed.sample_ids]
        samples = [sample for ids in self.engine.mesh.gather_objects(own) for sample in ids]
        digest = global_batch_digest(self.engine, batch)
        return (
            f"step {state.step + 1}: {problem}; the update was not applied. "
            f"Samples {samples[0]}..{samples[-1]} ({len(samples)}), batch digest {digest}"
        )

    def _track_threshold(self, stats: StepStats) -> None:
        model = self.engine.model
        if isinstance(model, DLCM) and model.boundary_detector.tracks_threshold:
            assert stats.prob_histogram is not None
            model.boundary_detector.track_threshold(stats.prob_histogram)
