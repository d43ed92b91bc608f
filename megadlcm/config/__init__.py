"""What a run is; stdlib and PyYAML only, so that a login node can check a run."""

from __future__ import annotations

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from megadlcm.config.decode import (
    config_from_dict,
    config_keys,
    config_to_dict,
    dump_config,
    load_config,
    model_config_from_dict,
)
from megadlcm.config.model import ModelConfig
from megadlcm.config.parallel import ParallelConfig
from megadlcm.config.run import RunConfig
from megadlcm.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    MupConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "InputError",
    "LoggingConfig",
    "ModelConfig",
    "MupConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainingConfig",
    "config_from_dict",
    "config_keys",
    "config_to_dict",
    "dump_config",
    "load_config",
    "model_config_from_dict",
]
