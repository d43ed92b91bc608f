"""ParallelConfig: how a run is spread over processes. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.errors import InputError
from megadlcm.config.model import ModelConfig
from megadlcm.config.rules import require_at_least, require_choice, require_positive

Recompute = Literal["none", "selective", "block"]
PipelinePlacement = Literal["linear", "folded"]


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
    """`block` keeps only the input of each block and computes the rest again in backward;
    `selective` keeps what matrix products and attention made and computes only the rest again."""

    pipeline_placement: PipelinePlacement = "linear"
    """`linear` gives each stage one chunk of the model; `folded` gives it two, so that encoder and
    decoder meet on the same stages."""

    collective_timeout_seconds: float = 600.0
    """How long a process waits for the others before the run ends with their names."""

    check_agreement: bool = False
    """Whether tensor parallel processes compare their boundary decisions bit by bit."""

    def __post_init__(self) -> None:
        require_at_least("parallel", self, 1, "tensor_parallel_size", "pipeline_parallel_size")
        require_choice("parallel", self, "zero_stage", (0, 1, 2, 3))
        require_choice("parallel", self, "recompute", get_args(Recompute))
        require_choice("parallel", self, "pipeline_placement", get_args(PipelinePlacement))
        require_positive("parallel", self, "collective_timeout_seconds")
        # DeepSpeed shares gradients out per micro-batch, while a pipeline has several in flight
        if self.pipeline_parallel_size > 1 and self.zero_stage > 1:
            raise InputError(
                f"parallel.zero_stage = {self.zero_stage}, must be 0 or 1 with "
                f"parallel.pipeline_parallel_size = {self.pipeline_parallel_size}: gradients of a "
                "stage are summed over many micro-batches before they may be shared out; set "
                "parallel.zero_stage=1",
                key="parallel.zero_stage",
            )
        # a setting without an effect is a mistake about the layout
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise InputError(
                "parallel.sequence_parallel = true needs parallel.tensor_parallel_size > 1: it "
                "splits rows over those processes; leave it false",
                key="parallel.sequence_parallel",
            )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among the processes.

        Args:
            world_size: processes of the run.

        Returns:
            The data parallel size.

        Raises:
            InputError: the processes cannot be shared out.
        """
        if world_size % self.model_parallel_size:
            raise InputError(
                f"world size = {world_size}, must be a multiple of "
                f"parallel.tensor_parallel_size * parallel.pipeline_parallel_size = "
                f"{self.tensor_parallel_size} * {self.pipeline_parallel_size}; start "
                f"{self.model_parallel_size} processes or a multiple, or change these keys",
                key="parallel.tensor_parallel_size",
            )
        return world_size // self.model_parallel_size


def check_split(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuses a tensor parallel size that does not divide the model.

    Args:
        model: shape of the model.
        parallel: size of each axis.

    Raises:
        InputError: heads, widths or vocabulary do not divide.
    """
    # heads and not widths: a head is computed by one process, and rotary pairs stay together
    keys = ["vocab_size", "token_heads", "token_kv_heads", "token_ffn_size"]
    if model.architecture == "dlcm":
        keys += ["concept_heads", "concept_kv_heads", "concept_ffn_size"]
    size = parallel.tensor_parallel_size
    for key in keys:
        value = getattr(model, key)
        if value % size:
            raise InputError(
                f"model.{key} = {value}, must be divisible by parallel.tensor_parallel_size = "
                f"{size}: each of these processes holds an equal part; change one of them",
                key=f"model.{key}",
            )
