"""RunConfig: a whole run, and the rules that span its sections. Stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from data_pipeline.config import DataConfig, LocalPathText
from data_pipeline.errors import InputError
from megadlcm.config.model import ModelConfig
from megadlcm.config.parallel import ParallelConfig, check_split
from megadlcm.config.rules import require_at_least
from megadlcm.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    MupConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One file = one run."""

    name: str
    """Name of the run in logs and reports."""

    seed: int = 0
    """Seed of initial values and boundary draws, and of the data where data.seed is null."""

    output_dir: LocalPathText
    """The run folder; a run resumes from the checkpoints that it finds there."""

    model: ModelConfig
    """What the network is."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is spread over processes."""

    training: TrainingConfig
    """Length, batches and loss."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates and the optimizer's constants, at base width."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the steps."""

    mup: MupConfig = field(default_factory=MupConfig)
    """Base width of the learning rates and initial values."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which stay."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """When and on what the run is evaluated."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What the run writes about itself."""

    def __post_init__(self) -> None:
        require_at_least("", self, 0, "seed")
        # an empty output_dir would be the current folder, and its checkpoints those of another run
        for key in ("name", "output_dir"):
            if not getattr(self, key):
                raise InputError(f"{key} is empty; give the run a {key}", key=key)
        # at stage 0 DeepSpeed steps the weights themselves, and bf16 loses most of a small update
        if self.training.precision == "bf16" and self.parallel.zero_stage == 0:
            raise InputError(
                "training.precision = bf16 with parallel.zero_stage = 0 would keep no fp32 master "
                "weights; set parallel.zero_stage=1",
                key="training.precision",
            )
        check_split(self.model, self.parallel)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.training.global_batch_size * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: train_steps, or enough of them for train_tokens."""
        if self.training.train_steps is not None:
            return self.training.train_steps
        assert self.training.train_tokens is not None
        return math.ceil(self.training.train_tokens / self.step_tokens)
