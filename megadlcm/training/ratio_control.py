"""The step size with which the ratio loss moves the boundary detector.

In `learned_global` and `learned_local` the detector has one gradient, g = lambda s u, with
u = dG/dW and s = R (R F - 1) / (R - 1): an integral controller of F whose gain is the step size.
AdamW divides g by its own size, error included, so that every step is a full one, however small
the error; the ratio then swings around its target by what a full step moves, tens of percent
where the probabilities lie close together. So the detector takes plain gradient steps whose size
is computed instead. To first order W -= eta g moves G by -eta lambda s |u|^2, and F follows by
rho = dF/dG: for a sharpening a, the jump 2 * 0.5^(1/a) - 1 of the draw at the threshold times the
density of probabilities there, and about 1/a from its slope elsewhere. With

    eta = gain (R - 1) / (R^2 rho lambda |u|^2)          |u|^2 = |g|^2 / (lambda s)^2

each step takes back the share `gain` of the error F - 1/R, at any width, ratio and lambda.
"""

from __future__ import annotations

import math

from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.ops.boundary import histogram_quantile
from megadlcm.training.objective import STEERED_MODES, StepSummary
from megadlcm.training.state import TrainState

LINEAR_EPS = 1.0
"""AdamW without averages moves by lr g / (|g| + eps); at this eps, far above any |g|, by lr g."""
_MOMENTUM = 0.9
_MAX_SHIFT = 0.05
"""Farthest that one step may move G; the first order holds no farther."""


def steers_detector(config: RunConfig) -> bool:
    """Whether the detector's step size is computed here; otherwise it is AdamW's or SGD's."""
    return (
        config.model.architecture == "dlcm"
        and config.model.boundary_mode in STEERED_MODES
        and config.optimizer.name == "adamw"
        and config.optimizer.boundary_gain > 0.0
        and config.training.ratio_loss_weight > 0.0
    )


class RatioController:
    """Computes the learning rate of the boundary group for each step.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.gain = config.optimizer.boundary_gain
        self.target = config.model.target_tokens_per_concept
        self.weight = config.training.ratio_loss_weight
        self.max_grad_norm = config.training.max_grad_norm
        self.sharpening = config.model.sharpening

    def learning_rate(
        self,
        summary: StepSummary,
        histogram: Tensor,
        detector_norm: float,
        grad_norm: float,
        state: TrainState,
    ) -> float:
        """Computes the rate for the step whose gradients are ready.

        Args:
            summary: sums of the whole step.
            histogram: its probabilities in 1024 bins.
            detector_norm: norm of the detector's gradient, before clipping.
            grad_norm: norm of the whole gradient, before clipping.
            state: its averages of |g|^2 and s^2 are updated.

        Returns:
            The rate, divided by the factor with which clipping will shorten the gradient.
        """
        slope_square = summary.ratio_slope_square / summary.num_tokens
        state.detector_gradient_square = _average(state.detector_gradient_square, detector_norm**2)
        state.ratio_slope_square = _average(state.ratio_slope_square, slope_square)
        if state.detector_gradient_square <= 0.0 or state.ratio_slope_square <= 0.0:
            return 0.0
        sensitivity = state.detector_gradient_square / (
            self.weight**2 * state.ratio_slope_square
        )  # |u|^2; the averages weigh it by the error, so that a step without one says nothing
        shift_per_slope = self.gain * (self.target - 1.0) / self.target**2
        shift_per_slope /= self._response(histogram)
        if slope_square > 0.0:
            shift_per_slope = min(shift_per_slope, _MAX_SHIFT / math.sqrt(slope_square))
        rate = shift_per_slope / (self.weight * sensitivity)
        clipped = self.max_grad_norm and grad_norm > self.max_grad_norm
        return rate * grad_norm / self.max_grad_norm if clipped else rate

    def _response(self, histogram: Tensor) -> float:
        """Estimates rho.

        The density is that of the probabilities around the one that the threshold has to meet, half
        a target below to half a target above; at 0.5 itself there may be none while F is far off.
        """
        share = 1.0 / self.target
        above, below = (float(histogram_quantile(histogram, part * share)) for part in (0.5, 1.5))
        density = share / max(above - below, 1.0 / histogram.numel())
        jump = 2.0 * 0.5 ** (1.0 / self.sharpening) - 1.0
        return jump * density + 1.0 / self.sharpening


def _average(average: float | None, value: float) -> float:
    return value if average is None else _MOMENTUM * average + (1.0 - _MOMENTUM) * value
