"""Where a concept ends: scores of neighbours and the decisions taken from them.

Letters: T tokens, D d_token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megadlcm.config import ModelConfig
from megadlcm.model.seams import WHOLE, Seams
from megadlcm.model.transformer import Linear
from megadlcm.ops.boundary import (
    BoundarySampling,
    boundary_probability,
    draw_balance,
    fixed_boundaries,
    histogram_quantile,
    histogram_share,
    limit_segments,
    neighbour_cosine,
    probability_histogram,
    sample_boundaries,
    threshold_boundaries,
)
from megadlcm.ops.packing import Packing

# slow: the quantile of one step is noise where batches are small
_THRESHOLD_MOMENTUM = 0.9
_PLACES: dict[str, Callable[[Tensor, ModelConfig], Tensor]] = {
    "every_r_tokens": lambda position_T, config: fixed_boundaries(
        position_T, config.target_tokens_per_concept
    ),
}
"""Decisions from places in the document alone, by `BoundaryTraits.decides_by`; (T,) to bool (T,).
Not from token ids: of a pipeline's stages only those of embedding and head have them."""


@dataclass(frozen=True)
class BoundaryOutput:
    """What the detector says of each token."""

    prob_T: Tensor
    """Boundary probability p, fp32 or wider (T,)."""
    mask_T: Tensor
    """Boundary decision b, bool (T,)."""
    threshold_mask_T: Tensor
    """The decision that evaluation would take, bool (T,)."""


class BoundaryStep(NamedTuple):
    """What the detector says of one token."""

    prob: Tensor
    """Boundary probability, fp32 or wider, scalar."""
    is_boundary: bool
    """The decision, by the threshold."""


@dataclass
class DetectorState:
    """What the detector keeps of one document between its tokens."""

    position: int = 0
    """Place of the next token."""
    previous_1D: Tensor | None = None
    """State of the token before, which the next one is compared with; None at the first."""
    since_boundary: int = 0
    """Tokens since the last boundary, it included."""


class WideLinear(Linear):
    """A matrix that computes in the type of its input, whatever its own.

    A module of its own because ZeRO 3 gathers the parameters of a module around its calls.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


class BoundaryDetector(nn.Module):
    """p_t = (1 - cos(W_q h_(t-1), W_k h_t)) / 2 and the decision taken from it (Eq. 5-6).

    Everything runs in fp32 whatever the precision of the model. W_q and W_k start as the same
    matrix with orthonormal rows (the identity when they are square), so that training begins with
    the plain cosine of neighbours; two independent random matrices would destroy it.
    """

    offset: Tensor
    threshold: Tensor
    balance: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.boundary_size or config.d_token
        learned = config.boundary.is_learned
        self.w_q = WideLinear(config.d_token, size) if learned else None
        self.w_k = WideLinear(config.d_token, size) if learned else None
        # buffers: saved with the weights, and moved by no optimizer
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        # only where it is used: checkpoints of other runs do not know it
        balance = torch.zeros((), dtype=torch.float32) if config.balances_draw else None
        self.register_buffer("balance", balance)
        self.reset_buffers()
        self.seams: Seams = WHOLE

    def reset_buffers(self) -> None:
        """Sets offset, threshold and balance to what a fresh run starts with."""
        self.offset.zero_()
        self.threshold.fill_(self.config.still_threshold)
        if self.balance is not None:
            # of tokens that all lie equally far from the threshold
            self.balance.fill_(1.0 / (self.config.target_tokens_per_concept - 1.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoundaryDetector:
        # a model cast to bf16 must not round these numbers: follow the device, keep the type
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype and not value.is_meta:
                setattr(self, name, value.to(moved.device))
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the offset is to be set from the first batch of a run."""
        return self.config.calibrates

    @property
    def tracks_threshold(self) -> bool:
        """Whether the threshold follows the quantile that gives the target ratio."""
        return self.config.tracks_threshold

    def forward(
        self, hidden_TD: Tensor, packing: Packing, sampling: BoundarySampling
    ) -> BoundaryOutput:
        """Scores each token and decides which ones are boundaries.

        Args:
            hidden_TD: encoder output.
            packing: the documents.
            sampling: names the random draws of training.

        Returns:
            Probabilities and decisions.
        """
        config, traits = self.config, self.config.boundary
        prob_T, decided_T = self._score(hidden_TD, packing.position)
        mask_T = threshold_T = self._limited(decided_T)
        if self.training and traits.is_sampled:
            # limited after the draw: a forced boundary must not depend on one that was not drawn
            drawn_T = sample_boundaries(
                prob_T, config.sharpening, sampling, packing.position, self.balance
            )
            mask_T = self._limited(drawn_T)
        if traits.decides_by == "score":
            # one flipped token would give the processes of a layer different numbers of concepts
            mask_T, threshold_T = self.seams.agree(torch.stack([mask_T, threshold_T])).unbind()
        return BoundaryOutput(prob_T, mask_T, threshold_T)

    def step(self, hidden_1D: Tensor, state: DetectorState) -> BoundaryStep:
        """Decides on the next token of one document, as `forward` does in evaluation.

        Args:
            hidden_1D: encoder output of the token.
            state: the document so far; updated in place.

        Returns:
            Its probability and decision.
        """
        before = state.previous_1D
        # a window of two rows, of which `_score` knows the second as it would among all
        rows_TD = hidden_1D if before is None else torch.cat((before, hidden_1D))
        start = state.position + 1 - len(rows_TD)
        position_T = torch.arange(start, state.position + 1, device=hidden_1D.device)
        prob_T, decided_T = self._score(rows_TD, position_T)
        limit = self.config.max_segment_tokens
        # counted from the last boundary whoever made it: the multiples of `limit_segments`
        is_full = limit > 0 and state.since_boundary == limit
        is_boundary = is_full or bool(decided_T[-1])
        state.previous_1D, state.position = hidden_1D, state.position + 1
        state.since_boundary = 1 if is_boundary else state.since_boundary + 1
        return BoundaryStep(prob_T[-1], is_boundary)

    def _score(self, hidden_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """Gives p and the decision of each token, before any draw and any limit on segments."""
        places = _PLACES.get(self.config.boundary.decides_by or "")
        if places is not None:
            mask_T = places(position_T, self.config)
            return mask_T.to(torch.promote_types(hidden_TD.dtype, torch.float32)), mask_T
        prob_T = boundary_probability(self.cosine(hidden_TD), position_T, self.offset)
        # a resumed run may stop to track, with a threshold that was saved while it did
        threshold = self.threshold if self.tracks_threshold else self.config.still_threshold
        return prob_T, threshold_boundaries(prob_T, position_T, threshold)

    def cosine(self, hidden_TD: Tensor) -> Tensor:
        """Cosine of each token with its predecessor, fp32 or wider (T,)."""
        if self.config.ratio_loss_detach_hidden:
            # below the projections, which still learn from the ratio loss
            hidden_TD = hidden_TD.detach()
        # autocast would multiply in bf16 whatever the type of the states
        with torch.autocast(hidden_TD.device.type, enabled=False):
            wide_TD = hidden_TD.to(torch.promote_types(hidden_TD.dtype, torch.float32))
            if self.w_q is None or self.w_k is None:
                return neighbour_cosine(wide_TD, wide_TD)
            return neighbour_cosine(self.w_q(wide_TD), self.w_k(wide_TD))

    def calibrate(self, cosine: Tensor) -> None:
        """Sets the offset so that thresholding gives the target ratio on these cosines.

        How similar neighbours are in a fresh encoder depends on widths and depths, and decides
        alone whether a run starts with hardly any concept or with twice too many. The offset
        makes p >= 0.5 hold for a share 1/R of the tokens; it is not trained.

        Args:
            cosine: cosines of tokens that have a predecessor, any shape; nothing is set from none.
        """
        if not cosine.numel():
            return
        share = 1.0 / self.config.target_tokens_per_concept
        ordered = cosine.detach().flatten().double().sort().values
        # p >= 0.5 where cos <= offset, so the offset is the cosine that a share 1/R does not exceed
        index = min(max(int(share * ordered.numel()) - 1, 0), ordered.numel() - 1)
        self.offset.fill_(float(ordered[index]))
        if self.balance is not None:
            inner_T = torch.ones(ordered.numel(), dtype=torch.int64)
            prob_T = boundary_probability(ordered.cpu(), inner_T, float(self.offset))
            balance = draw_balance(probability_histogram(prob_T, inner_T), self.config.sharpening)
            self.balance.fill_(1.0 if balance is None else balance)

    def track_threshold(self, histogram: Tensor, num_tokens: float, num_boundaries: float) -> None:
        """Moves the threshold towards the quantile of p that gives the target ratio.

        Of N tokens N/R are to be boundaries. Document starts are boundaries whatever their p, and
        so are those that a limit on segments forces; the quantile makes up the rest.

        Args:
            histogram: probabilities of one whole step, from `probability_histogram`.
            num_tokens: tokens of the step, N.
            num_boundaries: those that the threshold has made boundaries, starts and forced ones
                included.
        """
        counted = float(histogram.sum())
        if not counted:
            return
        wanted = num_tokens / self.config.target_tokens_per_concept - (num_tokens - counted)
        if self.config.max_segment_tokens:
            above = counted * histogram_share(histogram, float(self.threshold))
            wanted -= max(num_boundaries - (num_tokens - counted) - above, 0.0)
        quantile = histogram_quantile(histogram, min(max(wanted, 1.0) / counted, 1.0))
        self.threshold.lerp_(quantile.to(self.threshold), 1.0 - _THRESHOLD_MOMENTUM)

    def track_balance(self, histogram: Tensor) -> None:
        """Moves the balance of the draw towards that of a step's probabilities.

        Args:
            histogram: probabilities of one whole step, from `probability_histogram`.
        """
        wanted = draw_balance(histogram, self.config.sharpening)
        if self.balance is not None and wanted is not None:
            self.balance.lerp_(torch.full_like(self.balance, wanted), 1.0 - _THRESHOLD_MOMENTUM)

    def _limited(self, mask_T: Tensor) -> Tensor:
        limit = self.config.max_segment_tokens
        return limit_segments(mask_T, limit) if limit else mask_T
