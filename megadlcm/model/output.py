"""What a model returns; the same for DLCM and the dense control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megadlcm.model.chunking import BoundaryOutput
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout


@dataclass(frozen=True)
class ModelOutput:
    """Logits of a packed batch and, for DLCM, how it was segmented."""

    logits_TV: Tensor
    """Unnormalised log-probabilities of the next token (T, V)."""
    packing: Packing
    """The documents."""
    boundary: BoundaryOutput | None = None
    """Scores and decisions of the detector; None for the dense control."""
    layout: ConceptLayout | None = None
    """The concepts; None for the dense control."""

    @property
    def boundary_prob_T(self) -> Tensor | None:
        """Boundary probability of each token, fp32 (T,)."""
        return None if self.boundary is None else self.boundary.prob_T

    @property
    def boundary_mask_T(self) -> Tensor | None:
        """Boundary decision of each token, bool (T,)."""
        return None if self.boundary is None else self.boundary.mask_T
