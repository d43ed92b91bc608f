"""The step size with which the ratio loss moves the boundary detector.

In steered modes the detector has one gradient, g = lambda s u, with u = dG/dW and
s = R (R F - 1) / (R - 1): an integral controller of F whose gain is the step size.
AdamW divides g by its own size, error included, so that every step is a full one, however small
the error; the ratio then swings around its target by what a full step moves, tens of percent
where the probabilities lie close together. So the detector takes plain gradient steps whose size
is computed instead. To first order W -= eta g moves G by -eta lambda s |u|^2, and F follows by
rho = dF/dG: for a sharpening a, the jump 2 * 0.5^(1/a) - 1 of the draw at the threshold times the
density of probabilities there, and about 1/a from its slope elsewhere. With

    eta = gain (R - 1) / (R^2 rho lambda |u|^2)          |u|^2 = |g|^2 / (lambda s)^2

each step takes back the share `gain` of the error F - 1/R, at any width, ratio and lambda. With
one s for each document the s of all tokens stands for them: |u|^2 then comes out larger than it is,
never smaller, where documents pull in different directions.
"""

from __future__ import annotations

import math

from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.config.training import OPTIMIZERS
from megadlcm.engine.state import TrainState
from megadlcm.ops.boundary import draw_balance, histogram_quantile

LINEAR_EPS = 1e4
"""AdamW without averages moves by lr g / (|g| + eps): by lr / eps g at this eps, far above |g|."""
_SENSITIVITY_MOMENTUM = 0.9
_MAX_SHIFT = 0.05
"""Farthest that one step may move G; the first order holds no farther."""
_MAX_TURN = 0.02
"""Farthest that one step may move W, relative to its initial size: where no step can bring F
nearer to the target, u vanishes and eta would grow without end."""


def steers_detector(config: RunConfig) -> bool:
    """Whether the detector's step size is computed here; otherwise it is AdamW's or SGD's."""
    return (
        config.model.boundary.is_steered
        and OPTIMIZERS[config.optimizer.name].takes_plain_steps
        and config.optimizer.boundary_gain > 0.0
        and config.training.ratio_loss_weight > 0.0
    )


class RatioController:
    """Computes the detector's step size, step by step.

    Args:
        config: the run.
    """

    def __init__(self, config: RunConfig) -> None:
        delayed = config.training.ratio_statistics == "previous_step"
        # an error that is a step old is taken back more slowly, or it is taken back twice
        self.gain = config.optimizer.boundary_gain * (0.5 if delayed else 1.0)
        self.target = config.model.target_tokens_per_concept
        self.weight = config.training.ratio_loss_weight
        self.max_grad_norm = config.training.max_grad_norm
        self.sharpening = config.model.sharpening
        self.balances_draw = config.model.balances_draw
        # W_q and W_k start with orthonormal rows
        size = min(config.model.boundary_size or config.model.d_token, config.model.d_token)
        # both matrices together then have the norm sqrt(2 size)
        self.max_move = _MAX_TURN * math.sqrt(2.0 * size)

    def step_size(
        self, boundary_fraction: float, histogram: Tensor, detector_norm: float, state: TrainState
    ) -> float:
        """Computes eta for the step whose gradients are ready.

        Args:
            boundary_fraction: the F that made s.
            histogram: probabilities of the whole step, from `probability_histogram`.
            detector_norm: |g|, before clipping.
            state: its averages of (|g| / lambda)^2 and s^2 are updated.

        Returns:
            eta; 0 where there is nothing to step along.
        """
        # a saturated detector: no step helps, and the averages must not learn from it
        if detector_norm <= 0.0:
            return 0.0
        slope = self.target * (self.target * boundary_fraction - 1.0) / (self.target - 1.0)
        # their ratio is |u|^2 weighted by the error: a step without one says nothing about it
        state.detector_gradient_square = _average(
            state.detector_gradient_square, (detector_norm / self.weight) ** 2
        )
        state.ratio_slope_square = _average(state.ratio_slope_square, slope**2)
        if state.ratio_slope_square <= 0.0:
            return 0.0
        sensitivity = state.detector_gradient_square / state.ratio_slope_square
        shift_per_slope = self.gain * (self.target - 1.0) / self.target**2
        # by how much G must move for F to move by what is taken back
        shift_per_slope /= self._response(histogram)
        if slope:
            # G moves by shift_per_slope times the slope
            shift_per_slope = min(shift_per_slope, _MAX_SHIFT / abs(slope))
        return min(shift_per_slope / (self.weight * sensitivity), self.max_move / detector_norm)

    def adamw_rate(self, step_size: float, grad_norm: float) -> float:
        """Learning rate with which AdamW, at `LINEAR_EPS` and without averages, moves by eta g.

        Args:
            step_size: eta.
            grad_norm: norm of the whole gradient, which clipping will shorten.

        Returns:
            The rate of the boundary group.
        """
        # AdamW will see a gradient that is shorter by max_grad_norm / grad_norm
        clipped = self.max_grad_norm and grad_norm > self.max_grad_norm
        return LINEAR_EPS * step_size * (grad_norm / self.max_grad_norm if clipped else 1.0)

    def _response(self, histogram: Tensor) -> float:
        """Estimates rho.

        The density is that of the probabilities around the one that the threshold has to meet, from
        half a target above it to half a target below (or half-way to all tokens); at 0.5 itself
        there may be none while F is far off.
        """
        share = 1.0 / self.target
        few, many = 0.5 * share, min(1.5 * share, 0.5 * (1.0 + share))
        above, below = (float(histogram_quantile(histogram, part)) for part in (few, many))
        # probabilities in one bin are as far apart as the histogram can tell
        density = (many - few) / max(above - below, 1.0 / histogram.numel())
        # what a balanced draw takes from flips below and above the threshold
        kappa = (draw_balance(histogram, self.sharpening) if self.balances_draw else None) or 1.0
        rising, falling = min(kappa, 1.0), min(1.0 / kappa, 1.0)
        # sharpened p just above 0.5 less the one just below; 0 for the plain draw
        jump = 1.0 - (rising + falling) * (1.0 - 0.5 ** (1.0 / self.sharpening))
        slope = (rising * (1.0 - share) + falling * share) / self.sharpening
        return jump * density + slope


def _average(average: float | None, value: float) -> float:
    if average is None:
        return value
    return _SENSITIVITY_MOMENTUM * average + (1.0 - _SENSITIVITY_MOMENTUM) * value
