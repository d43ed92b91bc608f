"""Everything that a restart needs besides tensors, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of a run; they change only between optimizer steps."""

    step: int = 0
    """Completed optimizer steps."""
    consumed_samples: int = 0
    """Samples of the global order that were trained; the next step starts with this one."""
    consumed_tokens: int = 0
    """Tokens that were trained."""
    skipped_tokens: int = 0
    """Tokens of those samples that were left out because their bytes were damaged."""
    data_phases: list[dict[str, Any]] = field(default_factory=list)
    """Which sources the samples come from, and from which sample on; see `Phase`."""
    restart_count: int = 0
    """How often the run was resumed from a checkpoint."""
    previous_boundary_fraction: float | None = None
    """F of the last step, for `training.ratio_statistics: previous_step`; None before step 1."""
    detector_gradient_square: float | None = None
    """Running mean of the squared norm of the detector gradient over lambda; see ratio_control."""
    ratio_slope_square: float | None = None
    """Running mean of the squared slope of the ratio loss; see ratio_control."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Rebuilds a state; counters that an older version did not know keep their defaults."""
        # what a newer version knew is left out: it may count what this one does not
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
