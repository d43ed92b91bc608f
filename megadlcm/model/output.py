"""What a model returns; the same for DLCM and the dense control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.ops.cross_entropy import VocabularyPart, token_cross_entropy
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout


@dataclass(frozen=True)
class ModelOutput:
    """Logits of a packed batch and, for DLCM, how it was segmented."""

    logits_TV: Tensor
    """Unnormalised log-probabilities of the next token (T, V), or of a part of the vocabulary."""
    packing: Packing
    """The documents."""
    boundary: BoundaryOutput | None = None
    """Scores and decisions of the detector; None for the dense control."""
    layout: ConceptLayout | None = None
    """The concepts; None for the dense control."""
    vocabulary: VocabularyPart | None = None
    """Puts parts of the vocabulary together; None if the logits have all of it."""

    def token_losses(self, labels_T: Tensor) -> Tensor:
        """Negative log-likelihood of each label, nats, fp32 or wider; int64 (T,) to (T,)."""
        # of all rows: documents are packed whole, and each of their tokens has a label
        return token_cross_entropy(self.logits_TV, labels_T, self.vocabulary)

    @property
    def boundary_prob_T(self) -> Tensor | None:
        """Boundary probability of each token, fp32 (T,)."""
        return None if self.boundary is None else self.boundary.prob_T

    @property
    def boundary_mask_T(self) -> Tensor | None:
        """Boundary decision of each token, bool (T,)."""
        return None if self.boundary is None else self.boundary.mask_T
