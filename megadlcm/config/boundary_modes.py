"""What tells one boundary mode from another: a row of traits for each. Stdlib only.

Everything that depends on the mode asks for a trait, nothing for a name. A mode is a row here, and
code in `model/boundary_detector.py` where it decides as no other does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BoundaryMode = Literal["learned_global", "learned_local", "rule", "fixed", "ema_ste"]


@dataclass(frozen=True, kw_only=True)
class BoundaryTraits:
    """How a mode decides, and what is done about it in training."""

    decides_by: Literal["score", "every_r_tokens"] | None = "score"
    """`score`: p of neighbouring states. Otherwise by places: p is the decision as a number, so
    that it says nothing to smooth by."""

    is_learned: bool = False
    """Whether p comes from projections that are trained."""

    is_sampled: bool = False
    """Whether training draws from p; otherwise it takes the threshold, as evaluation does."""

    ratio_over: Literal["step", "document"] | None = None
    """Over what the ratio loss takes F: all tokens of a step, or each document by itself."""

    is_steered: bool = False
    """Whether the ratio loss alone trains the projections, so that its step size can be computed;
    see `engine/ratio_control.py`."""

    is_straight_through: bool = False
    """Whether cross-entropy reaches p: through the smoothing, and through a factor of 1 on what
    tokens read. p then crosses a pipeline with a gradient."""


BOUNDARY_MODES: dict[BoundaryMode, BoundaryTraits] = {
    "learned_global": BoundaryTraits(
        is_learned=True, is_sampled=True, ratio_over="step", is_steered=True
    ),
    "learned_local": BoundaryTraits(
        is_learned=True, is_sampled=True, ratio_over="document", is_steered=True
    ),
    "rule": BoundaryTraits(),
    "fixed": BoundaryTraits(decides_by="every_r_tokens"),
    # not steered: a step size computed from the ratio loss would scale cross-entropy's share too
    "ema_ste": BoundaryTraits(
        is_learned=True, is_sampled=True, ratio_over="step", is_straight_through=True
    ),
}
NO_BOUNDARIES = BoundaryTraits(decides_by=None)
"""The dense control, which has nothing to decide."""
