"""One optimizer step: micro-batches in, sums out; nothing is applied if anything is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.reading.batch import PackedBatch, StepBatch, batch_digest
from megadlcm.config import RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.objective import (
    NUM_SUMS,
    ChunkResult,
    DeviceBatch,
    Objective,
    StepStats,
    StepSummary,
    StepTotals,
)
from megadlcm.engine.ratio_control import RatioController, steers_detector
from megadlcm.engine.state import TrainState
from megadlcm.model import DLCM
from megadlcm.model.scaling import GROUPS, group_of
from megadlcm.model.units import Flow
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.plan.stages import Chunk


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
    boundary_step_size: float | None = None
    """How far the detector's projections move for a gradient of 1; None where not steered."""


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
        torch.from_numpy(batch.cu_seqlens).to(device, non_blocking=True),
        # the index in the global batch, so that no draw depends on the layout
        BoundarySampling(config.seed, step, token_index_T),
        torch.from_numpy(batch.labels_T).to(device, non_blocking=True),
    )


def global_batch_digest(engine: TrainingEngine, batch: StepBatch) -> str:
    """Digest of sample ids and tokens of the global batch, the same for every layout.

    Known to the processes that read the data, one of each replica; collective among them. Empty on
    others.
    """
    if not engine.mesh.reads_data:
        return ""
    gathered = engine.mesh.gather_over_data_parallel(tuple(batch.sample_digests))
    return batch_digest([digest for digests in gathered for digest in digests])


def calibrate_boundaries(
    engine: TrainingEngine, config: RunConfig, batch: StepBatch
) -> float | None:
    """Sets the detector's offset from the cosines of a whole global batch; once in a fresh run.

    Args:
        engine: the engine.
        config: the run.
        batch: this replica's share of the batch.

    Returns:
        The offset; None where no token of the batch has a predecessor, and nothing was set.
    """
    cosines: list[Tensor] = []
    batches = [to_device(packed, config, 0, engine.mesh.device) for packed in batch.micro_batches]
    offset = None
    with engine.whole_model() as model:

        def keep(_: int, flow: Flow) -> None:
            assert isinstance(model, DLCM) and flow.hidden_TD is not None
            inner_T = flow.packing.position > 0  # a document's first token has no predecessor
            # on the host, where they are gathered over the replicas and sorted
            cosines.append(model.boundary_detector.cosine(flow.hidden_TD)[inner_T].cpu())

        engine.pipeline.forward(batches, keep, until=UnitKind.SEGMENTATION)
        if engine.pipeline.owns_segmentation:
            own = torch.cat(cosines).numpy()
            # cosines and not quantiles: that of the whole batch is no mean of the parts'
            everywhere = engine.mesh.gather_over_data_parallel(own)
            cosine = torch.cat([torch.from_numpy(part) for part in everywhere])
            assert isinstance(model, DLCM)
            model.boundary_detector.calibrate(cosine)
            offset = float(model.boundary_detector.offset) if cosine.numel() else None
    stage = engine.partition.stage_of(UnitKind.SEGMENTATION)
    # the other stages hold no detector, and say the same number in their logs
    return engine.mesh.gather_over_pipeline(offset)[stage]


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
        parts = engine.partition.specs.values()
        # of the whole model: rows have the same groups whatever a stage holds
        used = {group_of(part.name) for part in parts if part.is_parameter}
        self.groups = [group for group in GROUPS if group in used]

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
        micro_batches = [
            to_device(packed, self.config, state.step, self.engine.mesh.device)
            for packed in batch.micro_batches
        ]
        totals = self._totals(micro_batches, state)
        stats = self._gradients(micro_batches, totals)
        result = self._audit(stats, batch, state)
        if steers_detector(self.config):
            result = self._steer(result, stats, totals, state)
        # after steering, which wants the gradient as it is and makes up for what is cut off here
        self.engine.clip_gradients(result.grad_norm, self.config.training.max_grad_norm)
        if not self.engine.step():
            raise NonFiniteError(self._message("DeepSpeed skipped the step", batch, state))
        # after the update: this step was decided by the threshold before
        self._track_boundaries(stats, result.summary)
        return result

    def _gradients(self, micro_batches: list[DeviceBatch], totals: StepTotals) -> StepStats:
        """Forward and backward passes of this stage; sums where the head is, zeros elsewhere."""
        stats = self.objective.empty_stats()

        def forward(chunk: Chunk, index: int, flow: Flow) -> Tensor | None:
            with self.engine.forward_pass():
                result: ChunkResult = self.engine.deepspeed(
                    chunk, flow, micro_batches[index], totals
                )
            if result.stats is not None:
                stats.add_(result.stats)
            return result.loss

        self.engine.pipeline.train(micro_batches, forward, self.engine.backward)
        return stats

    def _totals(self, micro_batches: list[DeviceBatch], state: TrainState) -> StepTotals:
        mesh = self.engine.mesh
        # one all-reduce for tokens and boundaries
        counts = torch.tensor(
            [float(sum(batch.tokens_T.numel() for batch in micro_batches)), 0.0],
            dtype=torch.float64,
            device=mesh.device,
        )
        previous = state.previous_boundary_fraction
        if not self.objective.needs_boundary_fraction:
            fraction = None
        elif self.config.training.ratio_statistics == "previous_step" and previous is not None:
            fraction = torch.tensor(previous, dtype=torch.float64)
        elif len(micro_batches) == 1:  # the forward pass itself will know F
            fraction = None
        else:
            counts[1] = self._count_boundaries(micro_batches)
            num_tokens, boundaries = mesh.sum_over_data_parallel(counts).tolist()
            return StepTotals(
                int(num_tokens), torch.tensor(boundaries / num_tokens, dtype=torch.float64)
            )
        return StepTotals(int(mesh.sum_over_data_parallel(counts)[0]), fraction)

    def _count_boundaries(self, micro_batches: list[DeviceBatch]) -> Tensor:
        """Boundaries of this replica's share, which the draws below will repeat exactly.

        Counted where the detector is and 0 on other stages, which need no F.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.mesh.device)

        def count(_: int, flow: Flow) -> None:
            assert flow.boundary is not None
            total.add_(flow.boundary.mask_T.sum())

        with self.engine.whole_model():
            self.engine.pipeline.forward(micro_batches, count, until=UnitKind.SEGMENTATION)
        return total

    def _audit(self, stats: StepStats, batch: StepBatch, state: TrainState) -> StepResult:
        """Copies sums and gradient norms to the host, once, and stops what is not finite.

        This runs before the optimizer: DeepSpeed's stages update one parameter group after the
        other, so a hook on the optimizer would see the last group after the first was changed.
        """
        mesh = self.engine.mesh
        squares = self.engine.gradient_square_sums()  # each element counted on one process
        # zeros from stages without the head: over the run and not over replicas alone
        sums = mesh.sum_over_run(stats.sums)
        numbers = torch.cat([sums, mesh.sum_everywhere(squares)]).tolist()
        if stats.prob_histogram is not None:
            # in place: the controller and the threshold read it below
            mesh.sum_over_run(stats.prob_histogram)
        summary = StepSummary.from_sums(numbers[:NUM_SUMS])
        by_group = dict(zip(GROUPS, numbers[NUM_SUMS:], strict=True))
        # one NaN or infinity survives every addition, so that one test finds them all
        if not math.isfinite(summary.cross_entropy + sum(by_group.values())):
            groups = [group for group, square in by_group.items() if not math.isfinite(square)]
            problem = f"loss {summary.loss}, non-finite gradients in {sorted(groups) or 'none'}"
            raise NonFiniteError(self._message(problem, batch, state))
        norms = {group: math.sqrt(by_group[group]) for group in self.groups}
        return StepResult(summary, math.sqrt(sum(by_group.values())), norms)

    def _steer(
        self, result: StepResult, stats: StepStats, totals: StepTotals, state: TrainState
    ) -> StepResult:
        """Sets the size of the step that this step's ratio loss makes with the boundary detector.

        Every stage computes it, so that their states stay the same.
        """
        used = totals.boundary_fraction
        # the F that made the slope of this step's loss: with `previous_step` that of the last one
        fraction = result.summary.boundary_fraction
        if used is not None and self.config.training.ratio_statistics == "previous_step":
            fraction = float(used)
        assert stats.prob_histogram is not None
        step_size = self.controller.step_size(
            fraction, stats.prob_histogram.cpu(), result.group_grad_norms["boundary"], state
        )
        for group in self.engine.optimizer.param_groups:
            if group["steered"]:
                group["lr"] = self.controller.adamw_rate(step_size, result.grad_norm)
        return replace(result, boundary_step_size=step_size)

    def _message(self, problem: str, batch: StepBatch, state: TrainState) -> str:
        own = [sample for packed in batch.micro_batches for sample in packed.sample_ids]
        everywhere = self.engine.mesh.gather_over_data_parallel(own)
        # named, so that a bad document can be found
        samples = [sample for ids in everywhere for sample in ids]
        digest = global_batch_digest(self.engine, batch)
        return (
            f"step {state.step + 1}: {problem}; the update was not applied. "
            f"Samples {samples[0]}..{samples[-1]} ({len(samples)}), batch digest {digest}"
        )

    def _track_boundaries(self, stats: StepStats, summary: StepSummary) -> None:
        """Lets threshold and balance of the draw follow the probabilities of the whole step."""
        model, histogram = self.engine.model, stats.prob_histogram
        detector = getattr(model, "boundary_detector", None)  # on its stage only
        if detector is None or histogram is None:
            return
        if detector.tracks_threshold:
            made = summary.num_threshold_boundaries
            detector.track_threshold(histogram, summary.num_tokens, made)
        detector.track_balance(histogram)
