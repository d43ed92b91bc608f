"""Model output -> loss and sums. The global normalisation of a step lives here and only here.

Gradients are averaged over the data-parallel replicas and added over the micro-batches. The loss of
one micro-batch is therefore the share of its *sums* in the whole step, times the replicas:

    loss = (sum CE + w * sum_t s_t p_t) / N * replicas

N counts the tokens of the whole step on all replicas, w is `training.ratio_loss_weight` and
s_t = R (R F - 1) / (R - 1) is the gradient of the ratio loss (DLCM Eq. 8-10). F is taken over the
whole step or over the token's own document, as the boundary mode says (`ratio_over`).
So the gradient of a step does not depend on how it was cut into micro-batches or over replicas.
Each of the two terms belongs to one stage of a pipeline: cross-entropy to the head, ratio loss to
the boundary detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadlcm.config import RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.model import LanguageModel
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.model.output import ModelOutput
from megadlcm.model.units import Flow, MicroBatch, run_units
from megadlcm.ops.boundary import NUM_PROBABILITY_BINS, probability_histogram
from megadlcm.ops.compression import ratio_gradient_scale
from megadlcm.ops.packing import Packing
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.plan.stages import Chunk

NUM_LENGTH_BINS = 65
"""Concept lengths 0..63 have a bin each, the last one holds all longer concepts."""
NEAR_HALF = 0.05
"""Probabilities this close to 0.5 are the ones whose decision flips easily."""


@dataclass(frozen=True)
class DeviceBatch(MicroBatch):
    """One micro-batch on the device, with what it is trained on."""

    labels_T: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Next tokens, int64 (T,)."""


@dataclass(frozen=True)
class StepTotals:
    """What the loss of a micro-batch must know about the whole step."""

    num_tokens: int
    """Tokens of the step on all replicas, N."""
    boundary_fraction: Tensor | None
    """F of the step, fp64 scalar; None where the micro-batch is the replica's whole share."""


@dataclass
class StepStats:
    """Sums over tokens, on the device; added over micro-batches and replicas, read when logging."""

    sums: Tensor
    """What `StepSummary` names, laid end to end by `pack_sums`, fp64 (NUM_SUMS,)."""
    prob_histogram: Tensor | None = None
    """Probabilities in equal bins, int64; only where something is steered by them."""

    def add_(self, other: StepStats) -> StepStats:
        """Adds the sums of another micro-batch in place."""
        self.sums += other.sums
        if self.prob_histogram is not None and other.prob_histogram is not None:
            self.prob_histogram += other.prob_histogram
        return self


@dataclass(frozen=True)
class StepSummary:
    """The sums of a whole step as Python numbers; a new field is a new sum."""

    cross_entropy: float
    num_tokens: float
    boundary_prob: float
    num_boundaries: float
    num_threshold_boundaries: float
    num_near_half: float
    concept_lengths: list[int] = field(default_factory=list)
    """Concepts of each length; see `NUM_LENGTH_BINS`."""

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> StepSummary:
        """Names the entries of `StepStats.sums` after they were copied to the host."""
        # not strict: the histogram follows the scalars
        scalars = dict(zip(SUMS, sums, strict=False))
        return cls(**scalars, concept_lengths=[int(count) for count in sums[len(SUMS) :]])

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per token."""
        return self.cross_entropy / self.num_tokens

    @property
    def boundary_fraction(self) -> float:
        """F, boundaries per token."""
        return self.num_boundaries / self.num_tokens

    @property
    def mean_boundary_prob(self) -> float:
        """G, mean boundary probability."""
        return self.boundary_prob / self.num_tokens


SUMS = tuple(entry.name for entry in fields(StepSummary) if entry.name != "concept_lengths")
NUM_SUMS = len(SUMS) + NUM_LENGTH_BINS


def pack_sums(
    scalars: Mapping[str, Tensor | int], lengths_M: Tensor | None, like: Tensor
) -> Tensor:
    """Lays named sums end to end, so that a step needs one all-reduce and one copy to the host.

    Args:
        scalars: numbers by name, of `SUMS`; what is not there is 0.
        lengths_M: tokens of each concept, int64 (M,); None without concepts.
        like: a tensor on the device.

    Returns:
        fp64 (NUM_SUMS,).
    """
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=like.device)
    for name, value in scalars.items():
        sums[SUMS.index(name)] = value
    if lengths_M is not None:
        bins_M = lengths_M.clamp(max=NUM_LENGTH_BINS - 1)
        # a view: the additions land in `sums`
        sums[len(SUMS) :].index_add_(0, bins_M, torch.ones_like(bins_M, dtype=torch.float64))
    return sums


class MicroBatchResult(NamedTuple):
    """Cross-entropy to back-propagate and sums to keep."""

    loss: Tensor
    stats: StepStats


class Objective:
    """Computes the loss of a micro-batch as its share of the step.

    Args:
        config: the run.
        mesh: replicas over which a step is summed.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh) -> None:
        self.mesh = mesh
        self.traits = config.model.boundary
        self.target = config.model.target_tokens_per_concept
        self.ratio_loss_weight = config.training.ratio_loss_weight
        # it is summed over the run each step, so only where something reads it
        model = config.model
        self.keeps_histogram = (
            self.traits.is_steered or model.tracks_threshold or model.balances_draw
        )
        # gradients are divided by it; see the module's docstring
        self.averaged_over = mesh.data_parallel_size

    @property
    def needs_boundary_fraction(self) -> bool:
        """Whether the ratio loss is driven by F of the whole step."""
        return self.traits.ratio_over == "step" and self.ratio_loss_weight != 0.0

    def __call__(
        self, output: ModelOutput, labels_T: Tensor, totals: StepTotals
    ) -> MicroBatchResult:
        """Computes cross-entropy and sums of one micro-batch.

        Args:
            output: what the model returned.
            labels_T: next tokens, int64 (T,).
            totals: sums of the whole step.

        Returns:
            The loss, scaled so that averages over replicas give the mean over the step, and sums.
        """
        loss_T = output.token_losses(labels_T)
        # a share of the step's tokens, not a mean of these: micro-batches need not be equally long
        loss = loss_T.sum() * (self.averaged_over / totals.num_tokens)
        return MicroBatchResult(loss, self._stats(output, loss_T.detach()))

    def ratio_loss(
        self, boundary: BoundaryOutput, packing: Packing, totals: StepTotals
    ) -> Tensor | None:
        """Computes a scalar whose gradient is that of one micro-batch's ratio loss.

        Args:
            boundary: what the detector said.
            packing: the documents.
            totals: sums of the whole step.

        Returns:
            The scalar, scaled as the loss; None where nothing is driven by it.
        """
        if self.ratio_loss_weight == 0.0:
            return None
        # may be an all-reduce: every replica comes here, also without a gradient
        slope_T = self._ratio_slope(boundary, packing, totals)
        if slope_T is None or not boundary.prob_T.requires_grad:
            return None
        # its gradient is that of the ratio loss times N
        ratio = (slope_T.to(boundary.prob_T.dtype) * boundary.prob_T).sum()
        return self.ratio_loss_weight * ratio * (self.averaged_over / totals.num_tokens)

    def _ratio_slope(
        self, boundary: BoundaryOutput, packing: Packing, totals: StepTotals
    ) -> Tensor | None:
        """s_t of each token, (T,)."""
        if self.traits.ratio_over is None:
            return None
        if self.traits.ratio_over == "document":
            document_T = packing.document_index()
            lengths = packing.cu_seqlens.diff().double()
            # whole numbers in fp64: the order of the additions leaves no trace
            counts = torch.zeros_like(lengths)
            counts.index_add_(0, document_T, boundary.mask_T.double())
            return ratio_gradient_scale(counts / lengths, self.target)[document_T]
        fraction = totals.boundary_fraction
        if fraction is None:  # the forward pass of a replica's whole share knows F by itself
            count = self.mesh.sum_over_data_parallel(boundary.mask_T.sum(dtype=torch.float64))
            fraction = count / totals.num_tokens
        slope = ratio_gradient_scale(fraction, self.target)
        return slope.to(boundary.prob_T.device).expand(boundary.prob_T.shape)

    def empty_stats(self) -> StepStats:
        """Sums of nothing, for a stage that computes none."""
        device = self.mesh.device
        histogram = None
        if self.keeps_histogram:
            histogram = torch.zeros(NUM_PROBABILITY_BINS, dtype=torch.int64, device=device)
        # the shapes of the stage that has some: all of them take part in one all-reduce
        return StepStats(torch.zeros(NUM_SUMS, dtype=torch.float64, device=device), histogram)

    @torch.no_grad()
    def _stats(self, output: ModelOutput, loss_T: Tensor) -> StepStats:
        wide = torch.float64
        # fp64: a step has millions of tokens, and layouts are compared to the last digits
        sums: dict[str, Tensor | int] = {
            "cross_entropy": loss_T.sum(dtype=wide),
            "num_tokens": loss_T.numel(),
        }
        boundary, layout = output.boundary, output.layout
        if boundary is None:
            return StepStats(pack_sums(sums, None, loss_T))
        sums |= {
            "boundary_prob": boundary.prob_T.sum(dtype=wide),
            "num_boundaries": boundary.mask_T.sum(dtype=wide),
            "num_threshold_boundaries": boundary.threshold_mask_T.sum(dtype=wide),
            # how many decisions the arithmetic of another layout could flip
            "num_near_half": ((boundary.prob_T - 0.5).abs() < NEAR_HALF).sum(dtype=wide),
        }
        histogram = None
        if self.keeps_histogram:
            histogram = probability_histogram(boundary.prob_T, output.packing.position)
        lengths_M = None if layout is None else layout.pooled_count_M
        return StepStats(pack_sums(sums, lengths_M, loss_T), histogram)


class ChunkResult(NamedTuple):
    """What one chunk made of one micro-batch.

    A NamedTuple because DeepSpeed hooks the start of the backward pass on the tensors that the
    module returns, and looks for them in tuples, lists and dicts only.
    """

    loss: Tensor | None
    """What the chunk adds to the loss."""
    stats: StepStats | None
    """Sums of the micro-batch, from the last chunk."""
    outputs: tuple[Tensor, ...]
    """Tensors for other chunks."""


class TrainingForward(nn.Module):
    """The module that DeepSpeed drives: a chunk of the model and the losses that belong to it.

    Args:
        model: what this process holds of the model.
        objective: turns its output into the loss.
    """

    def __init__(self, model: LanguageModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self, chunk: Chunk, flow: Flow, batch: DeviceBatch, totals: StepTotals
    ) -> ChunkResult:
        """Runs a chunk on one micro-batch and computes its share of the step's loss."""
        run_units(self.model, chunk.unit_ids, flow)
        losses: list[Tensor] = []
        if UnitKind.SEGMENTATION in chunk.kinds:
            assert flow.boundary is not None
            # here and not at the head, so that p needs no way back over the stages
            ratio = self.objective.ratio_loss(flow.boundary, flow.packing, totals)
            losses += [] if ratio is None else [ratio]
        if UnitKind.LM_HEAD in chunk.kinds:
            result: MicroBatchResult = self.objective(flow.output, batch.labels_T, totals)
            losses.append(result.loss)
            return ChunkResult(torch.stack(losses).sum(), result.stats, ())
        # what has no gradient DeepSpeed must not see, or it waits for a backward pass of it
        made = [
            flow.states,
            flow.hidden_TD,
            None if flow.boundary is None else flow.boundary.prob_T,
        ]
        outputs = tuple(tensor for tensor in made if tensor is not None and tensor.requires_grad)
        return ChunkResult(losses[0] if losses else None, None, outputs)
