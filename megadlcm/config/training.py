"""How a run trains, saves, evaluates and logs. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from data_pipeline.config import PathText
from data_pipeline.errors import InputError
from megadlcm.config.rules import (
    require_at_least,
    require_choice,
    require_positive,
    require_share,
)

Precision = Literal["fp32", "bf16"]
RatioStatistics = Literal["same_step", "previous_step"]
OptimizerName = Literal["adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """What the rest of a run must know of an optimizer; built in `engine/optimizer.py`."""

    num_moments: int
    """Running averages in fp32 that it keeps of each parameter."""

    takes_plain_steps: bool
    """Whether some of its groups can be made to move by a computed step size times the gradient,
    while the others move as ever; see `engine/ratio_control.py`."""


OPTIMIZERS: dict[OptimizerName, OptimizerTraits] = {
    "adamw": OptimizerTraits(num_moments=2, takes_plain_steps=True),
    # its steps are plain everywhere: steering only the detector would compare no layouts
    "sgd": OptimizerTraits(num_moments=0, takes_plain_steps=False),
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long a run is, what one step sees, and the loss."""

    train_steps: int | None = None
    """Optimizer steps of the whole run; give this or train_tokens."""

    train_tokens: int | None = None
    """Token budget of the whole run, rounded up to whole steps; give this or train_steps."""

    global_batch_size: int
    """Samples of data.seq_len tokens in one optimizer step, over all processes."""

    micro_batch_size: int
    """Samples that one process packs into one forward pass."""

    precision: Precision = "fp32"
    """Type of the arithmetic; `bf16` keeps fp32 master weights."""

    max_grad_norm: float = 1.0
    """Longest gradient, over all parameters; longer ones are scaled down. 0 means no clipping."""

    ratio_loss_weight: float = 0.03
    """The paper's lambda: weight of the loss that keeps the compression at its target."""

    ratio_statistics: RatioStatistics = "same_step"
    """Whether the ratio is controlled by this step's boundary fraction or by the last one's."""

    def __post_init__(self) -> None:
        """Checks ranges, the budget, and that micro-batches fill the batch; raises InputError."""
        if self.train_steps is None and self.train_tokens is None:
            raise InputError(
                "training.train_steps and training.train_tokens are both null, one must say how "
                "long the run is; give one of the two",
                key="training.train_steps",
            )
        if self.train_steps is not None and self.train_tokens is not None:
            raise InputError(
                f"training.train_steps = {self.train_steps} and training.train_tokens = "
                f"{self.train_tokens}, only one may be given; set the other one to null",
                key="training.train_steps",
            )
        require_at_least("training", self, 1, "train_steps", "train_tokens")
        require_at_least("training", self, 1, "global_batch_size", "micro_batch_size")
        # on any number of replicas; how many there are is known later
        if self.global_batch_size % self.micro_batch_size:
            raise InputError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size = {self.micro_batch_size}; change one of the two",
                key="training.global_batch_size",
            )
        require_choice("training", self, "precision", get_args(Precision))
        require_choice("training", self, "ratio_statistics", get_args(RatioStatistics))
        require_at_least("training", self, 0, "max_grad_norm", "ratio_loss_weight")

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches of one replica in an optimizer step.

        Args:
            data_parallel_size: replicas.

        Returns:
            global_batch_size / (micro_batch_size * replicas).

        Raises:
            InputError: the division leaves a rest.
        """
        together = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % together:
            raise InputError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size * replicas = {self.micro_batch_size} * "
                f"{data_parallel_size}; change one of the three",
                key="training.global_batch_size",
            )
        return self.global_batch_size // together


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer at base width; muP scales learning rate and eps to the run's widths."""

    learning_rate: float = 3e-3
    """Peak learning rate at mup.base_width."""

    token_learning_rate: float | None = None
    """The same for matrices that read token width; None means learning_rate."""

    concept_learning_rate: float | None = None
    """The same for matrices that read concept width; None means learning_rate."""

    boundary_learning_rate: float | None = None
    """The same for the boundary detector where boundary_gain does not hold; None as above."""

    boundary_gain: float = 0.5
    """Share of the error in F that a step of the ratio loss takes back, in the modes in which it
    alone trains the detector; 0 trains the detector by AdamW instead."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's running mean and running square."""

    eps: float = 1e-8
    """AdamW's epsilon at mup.base_width."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, multiplied by the learning rate of each."""

    name: OptimizerName = "adamw"
    """`adamw`, or `sgd` without momentum for comparing layouts."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_choice("optimizer", self, "name", get_args(OptimizerName))
        require_positive("optimizer", self, "learning_rate", "eps")
        require_at_least("optimizer", self, 0, "weight_decay", *_GROUP_RATES)
        require_share("optimizer", self, "boundary_gain")
        # at 1 the running averages would never move
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise InputError(
                f"optimizer.betas = {list(self.betas)}, each must be >= 0 and < 1; "
                "choose for example [0.9, 0.95]",
                key="optimizer.betas",
            )


# 0 is allowed: a group that does not train
_GROUP_RATES = ("token_learning_rate", "concept_learning_rate", "boundary_learning_rate")


@dataclass(frozen=True)
class ScheduleConfig:
    """Warmup-stable-decay of the learning rate, linear in both flanks."""

    warmup_steps: int = 0
    """Optimizer steps from zero to the peak."""

    decay_fraction: float = 0.1
    """Share of all steps, at the end, in which the rate falls."""

    final_ratio: float = 0.0
    """Share of the peak that is left after the last step."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_at_least("schedule", self, 0, "warmup_steps")
        require_share("schedule", self, "decay_fraction", "final_ratio")


@dataclass(frozen=True)
class MupConfig:
    """Where the base values of muP were tuned."""

    base_width: int = 256
    """Width at which learning_rate, eps and init_std hold as they are."""

    init_std: float = 0.02
    """Standard deviation of the initial matrices at base_width."""

    embedding_std: float = 1.0
    """Standard deviation of the initial token embeddings, at every width."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_at_least("mup", self, 1, "base_width")
        require_positive("mup", self, "init_std", "embedding_std")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which stay."""

    interval_steps: int = 1000
    """Steps between checkpoints; the last step always writes one, 0 means only that."""

    keep: int = 3
    """How many of the newest checkpoints stay; 0 means all."""

    keep_every: int = 0
    """Those whose step is a multiple of it stay as well; 0 means none."""

    folder: PathText | None = None
    """Where they go: a folder, or the URL of a place in an object store, of this run alone; None
    means `checkpoints` in the run folder."""

    asynchronous: bool = field(default=False, metadata={"key": "async"})
    """Whether training goes on while a checkpoint is written; spelt `async` in YAML."""

    timeout_seconds: float = 600.0
    """How long a process may write without getting further before its save counts as failed."""

    max_failures: int = 2
    """Saves that fail one after the other and end the run; fewer are logged."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_at_least("checkpoint", self, 0, "interval_steps", "keep", "keep_every")
        require_at_least("checkpoint", self, 1, "max_failures")
        require_positive("checkpoint", self, "timeout_seconds")


@dataclass(frozen=True)
class EvaluationConfig:
    """When and on how much held-out text a run is evaluated."""

    interval_steps: int = 0
    """Steps between evaluations; the last step always has one, 0 means only that."""

    max_documents: int = 0
    """Documents of each source of data.valid that are read; 0 means all."""

    batch_tokens: int = 16384
    """Tokens that are packed into one forward pass."""

    num_sample_texts: int = 4
    """Documents whose text is written to samples/ with its concept boundaries marked."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_at_least("evaluation", self, 0, "interval_steps", "max_documents")
        require_at_least("evaluation", self, 0, "num_sample_texts")
        require_at_least("evaluation", self, 1, "batch_tokens")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes about itself."""

    interval_steps: int = 1
    """Steps between rows of metrics.jsonl."""

    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for utilization; None means known or measured by the run."""

    tensorboard: bool = True
    """Whether metrics also go to TensorBoard."""

    def __post_init__(self) -> None:
        """Checks the ranges; raises InputError."""
        require_at_least("logging", self, 1, "interval_steps")
        require_positive("logging", self, "peak_tflops")
