"""Where a model may be sharded over processes: the places at which tensor parallelism communicates.

The model is written for one device and calls these methods where something else than a plain
tensor may be needed; here they do nothing. `megadlcm.parallel.tensor` has the ones that
communicate.
"""

from __future__ import annotations

from torch import Tensor


class Seams:
    """A model that is whole: every method hands back what it was given."""

    def split_rows(self, states: Tensor) -> Tensor:
        """Whole rows -> the rows that this process keeps between layers."""
        return states

    def join_rows(self, states: Tensor, num_rows: int) -> Tensor:
        """The rows that this process keeps -> all `num_rows` rows."""
        return states

    def to_layer(self, states: Tensor, num_rows: int) -> Tensor:
        """Kept rows -> the input of a layer whose heads or inner width are sharded."""
        return states

    def from_layer(self, partial: Tensor) -> Tensor:
        """Output of such a layer, a summand on each process -> the kept rows of the sum."""
        return partial

    def copy_to_layer(self, states: Tensor) -> Tensor:
        """Whole rows -> the input of a layer that is sharded."""
        return states

    def sum_from_layer(self, partial: Tensor) -> Tensor:
        """Output of a layer that is sharded -> whole rows of the sum."""
        return partial

    def agree(self, decisions: Tensor) -> Tensor:
        """Decisions (bool) that must be the same bits on every process that shares the layers."""
        return decisions

    def max_over_vocabulary(self, values: Tensor) -> Tensor:
        """Largest value over the parts of the vocabulary, without a gradient."""
        return values

    def sum_over_vocabulary(self, values: Tensor) -> Tensor:
        """Sum over the parts of the vocabulary; each part's gradient is that of the sum."""
        return values

    def vocabulary_start(self, part_size: int) -> int:
        """First token id of this process's part of the vocabulary."""
        return 0


# one object for all: `is WHOLE` tells a model on one device
WHOLE = Seams()
