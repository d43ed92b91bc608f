"""ParallelConfig: how a run is spread over processes. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.errors import InputError
from megadlcm.config.rules import require_at_least, require_choice

Recompute = Literal["none", "block"]


@dataclass(frozen=True)
class ParallelConfig:
    """Size of each axis; the data parallel size is what is left of the processes."""

    tensor_parallel_size: int = 1
    """Processes that share each layer."""

    pipeline_parallel_size: int = 1
    """Stages that share the stack of layers."""

    zero_stage: int = 1
    """What data parallel processes share: 0 nothing, 1 optimizer, 2 gradients, 3 parameters."""

    sequence_parallel: bool = False
    """Whether norms and residuals are split over the tensor parallel processes."""

    recompute: Recompute = "none"
    """`block` keeps only the input of each block and computes the rest again in backward."""

    def __post_init__(self) -> None:
        """Checks the ranges and refuses the axes that are not trained yet; raises InputError."""
        require_at_least("parallel", self, 1, "tensor_parallel_size", "pipeline_parallel_size")
        require_choice("parallel", self, "zero_stage", (0, 1, 2, 3))
        require_choice("parallel", self, "recompute", get_args(Recompute))
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, key) > 1:
                raise InputError(
                    f"parallel.{key} = {getattr(self, key)}, must be 1: this version trains with "
                    "data parallelism only; raise parallel.zero_stage to save memory"
                )
        if self.sequence_parallel:
            raise InputError(
                "parallel.sequence_parallel = true needs parallel.tensor_parallel_size > 1, and "
                "this version trains with data parallelism only; leave it false"
            )
