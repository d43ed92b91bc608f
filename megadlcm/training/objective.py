"""Model output -> loss and sums. The global normalisation of a step lives here and only here.

DeepSpeed averages gradients over the data-parallel replicas and over the micro-batches. The loss of
one micro-batch is therefore the share of its *sums* in the whole step, times both counts:

    loss = (sum CE + w * sum_t s_t p_t) / N * replicas * micro-batches

N counts the tokens of the whole step on all replicas, w is `training.ratio_loss_weight` and
s_t = R (R F - 1) / (R - 1) is the gradient of the ratio loss (DLCM Eq. 8-10). F is taken over the
whole step (`learned_global`, `ema_ste`) or over the token's own document (`learned_local`).
So the gradient of a step does not depend on how it was cut into micro-batches or over replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadlcm.config import RunConfig
from megadlcm.model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.ops.boundary import BoundarySampling, probability_histogram
from megadlcm.ops.compression import ratio_gradient_scale
from megadlcm.ops.cross_entropy import token_cross_entropy
from megadlcm.parallel.mesh import ParallelMesh

NUM_LENGTH_BINS = 65
"""Concept lengths 0..63 have a bin each, the last one holds all longer concepts."""
NEAR_HALF = 0.05
"""Probabilities this close to 0.5 are the ones whose decision flips easily."""

GLOBAL_RATIO_MODES = ("learned_global", "ema_ste")
STEERED_MODES = ("learned_global", "learned_local")
"""Modes in which the ratio loss alone trains the detector; see ratio_control."""
_SUMS = (
    "cross_entropy",
    "num_tokens",
    "boundary_prob",
    "num_boundaries",
    "num_threshold_boundaries",
    "num_near_half",
)
NUM_SUMS = len(_SUMS) + NUM_LENGTH_BINS


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the device."""

    tokens_T: Tensor
    """Token ids, int64 (T,)."""
    labels_T: Tensor
    """Next tokens, int64 (T,)."""
    cu_seqlens: Tensor
    """Offsets of the documents, int32 (S+1,)."""
    sampling: BoundarySampling
    """Names the random draws of this micro-batch."""


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
    """The scalars of `StepSummary` and the histogram of concept lengths, fp64 (NUM_SUMS,)."""
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
    """The sums of a whole step as Python numbers."""

    cross_entropy: float
    num_tokens: float
    boundary_prob: float
    num_boundaries: float
    num_threshold_boundaries: float
    num_near_half: float
    concept_lengths: list[int] = field(default_factory=list)
    """Concepts of each length; see `NUM_LENGTH_BINS`."""

    @classmethod
    def from_sums(cls, sums: list[float]) -> StepSummary:
        """Names the entries of `StepStats.sums` after they were copied to the host."""
        scalars = dict(zip(_SUMS, sums, strict=False))
        return cls(**scalars, concept_lengths=[int(count) for count in sums[len(_SUMS) :]])

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


class MicroBatchResult(NamedTuple):
    """Loss to back-propagate and sums to keep.

    A NamedTuple because DeepSpeed hooks the start of the backward pass on the tensors that the
    module returns, and looks for them in tuples, lists and dicts only.
    """

    loss: Tensor
    stats: StepStats


class Objective:
    """Computes the loss of a micro-batch as its share of the step.

    Args:
        config: the run.
        mesh: replicas over which a step is summed.
        gradient_accumulation_steps: micro-batches of one replica in a step.
    """

    def __init__(
        self, config: RunConfig, mesh: ParallelMesh, gradient_accumulation_steps: int
    ) -> None:
        self.mesh = mesh
        self.mode = config.model.boundary_mode if config.model.architecture == "dlcm" else "none"
        self.target = config.model.target_tokens_per_concept
        self.ratio_loss_weight = config.training.ratio_loss_weight
        self.keeps_histogram = self.mode in STEERED_MODES or (
            self.mode == "rule" and config.model.rule_threshold is None
        )
        # DeepSpeed divides by both; see the module's docstring
        self.averaged_over = mesh.data_parallel_size * gradient_accumulation_steps

    @property
    def needs_boundary_fraction(self) -> bool:
        """Whether the ratio loss is driven by F of the whole step."""
        return self.mode in GLOBAL_RATIO_MODES and self.ratio_loss_weight != 0.0

    def __call__(
        self, output: ModelOutput, labels_T: Tensor, totals: StepTotals
    ) -> MicroBatchResult:
        """Computes loss and sums of one micro-batch.

        Args:
            output: what the model returned.
            labels_T: next tokens, int64 (T,).
            totals: sums of the whole step.

        Returns:
            The loss, scaled so that DeepSpeed's averages give the mean over the step, and the sums.
        """
        loss_T = token_cross_entropy(output.logits_TV, labels_T)
        loss = loss_T.sum()
        slope_T = self._ratio_slope(output, totals) if self.ratio_loss_weight != 0.0 else None
        if slope_T is not None and output.boundary is not None:
            # its gradient is that of the ratio loss times N
            ratio = (slope_T.to(output.boundary.prob_T.dtype) * output.boundary.prob_T).sum()
            loss = loss + self.ratio_loss_weight * ratio
        loss = loss * (self.averaged_over / totals.num_tokens)
        return MicroBatchResult(loss, self._stats(output, loss_T.detach()))

    def _ratio_slope(self, output: ModelOutput, totals: StepTotals) -> Tensor | None:
        """s_t of each token, (T,)."""
        boundary = output.boundary
        if boundary is None or self.mode not in (*GLOBAL_RATIO_MODES, "learned_local"):
            return None
        if self.mode == "learned_local":
            document_T = output.packing.document_index()
            lengths = output.packing.cu_seqlens.diff().double()
            counts = torch.zeros_like(lengths)
            counts.index_add_(0, document_T, boundary.mask_T.double())
            return ratio_gradient_scale(counts / lengths, self.target)[document_T]
        fraction = totals.boundary_fraction
        if fraction is None:
            count = self.mesh.sum_over_data_parallel(boundary.mask_T.sum(dtype=torch.float64))
            fraction = count / totals.num_tokens
        slope = ratio_gradient_scale(fraction, self.target)
        return slope.to(boundary.prob_T.device).expand(boundary.prob_T.shape)

    @torch.no_grad()
    def _stats(self, output: ModelOutput, loss_T: Tensor) -> StepStats:
        wide = torch.float64
        sums = torch.zeros(NUM_SUMS, dtype=wide, device=loss_T.device)
        sums[0] = loss_T.sum(dtype=wide)
        sums[1] = loss_T.numel()
        boundary, layout = output.boundary, output.layout
        if boundary is None:
            return StepStats(sums)
        sums[2] = boundary.prob_T.sum(dtype=wide)
        sums[3] = boundary.mask_T.sum(dtype=wide)
        sums[4] = boundary.threshold_mask_T.sum(dtype=wide)
        sums[5] = ((boundary.prob_T - 0.5).abs() < NEAR_HALF).sum(dtype=wide)
        if layout is not None:
            bins_M = layout.pooled_count_M.clamp(max=NUM_LENGTH_BINS - 1)
            lengths = sums[len(_SUMS) :]
            lengths.index_add_(0, bins_M, torch.ones_like(bins_M, dtype=wide))
        histogram = None
        if self.keeps_histogram:
            histogram = probability_histogram(boundary.prob_T, output.packing)
        return StepStats(sums, histogram)


class TrainingForward(nn.Module):
    """The module that DeepSpeed drives: model and objective, micro-batch in, loss out.

    Args:
        model: the model.
        objective: turns its output into the loss.
    """

    def __init__(self, model: LanguageModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: DeviceBatch, totals: StepTotals) -> MicroBatchResult:
        """Runs the model on one micro-batch and computes its share of the step's loss."""
        output = self.model(batch.tokens_T, batch.cu_seqlens, batch.sampling)
        result: MicroBatchResult = self.objective(output, batch.labels_T, totals)
        return result
