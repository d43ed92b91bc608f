"""The story of a training run: config -> mesh -> model -> engine -> data -> fit."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.index import read_index
from data_pipeline.loader import StepLoader
from data_pipeline.samples import SourceSummary, check_sources
from data_pipeline.tokenizer import load_tokenizer
from megadlcm.config import RunConfig
from megadlcm.model import build_model
from megadlcm.parallel.mesh import ParallelMesh, join_process_group
from megadlcm.training.checkpoint import resume
from megadlcm.training.engine import TrainingEngine, build_engine
from megadlcm.training.metrics import MetricsWriter
from megadlcm.training.run_folder import prepare_run_folder
from megadlcm.training.state import TrainState
from megadlcm.training.step import NonFiniteError
from megadlcm.training.trainer import Trainer, TrainingData

logger = logging.getLogger(__name__)

_LOGGERS = ("megadlcm", "data_pipeline")


def run(config: RunConfig) -> int:
    """Trains a run, from its newest complete checkpoint if there is one, to its last step.

    Args:
        config: the resolved run.

    Returns:
        Exit code: 0 done, 1 the loss or a gradient was not finite.

    Raises:
        InputError: the config, the data or the launcher's environment is wrong.
    """
    sources = check_training_sources(config)
    mesh = join_process_group()
    handler = configure_logging(config, mesh)
    try:
        return _train(config, mesh, sources)
    except NonFiniteError as error:
        logger.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        logger.error("%s", error)
        raise
    except Exception:
        logger.exception("the run failed")
        raise
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()


def _train(config: RunConfig, mesh: ParallelMesh, sources: SourceSummary) -> int:
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.mup, seed=config.seed)
    engine = build_engine(model, config, mesh)
    identity = data_identity(config)
    resumed = resume(engine, config, identity)
    state = resumed or TrainState()
    if mesh.is_writer:
        prepare_run_folder(config, resumed is not None)
    loader = StepLoader(
        config.data,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        start_sample=state.consumed_samples,
    )
    data = TrainingData(loader, load_tokenizer(sources.tokenizer), identity)
    metrics = None
    try:
        if mesh.is_writer:
            metrics = MetricsWriter(
                Path(config.output_dir), state.step + 1, config.logging.tensorboard
            )
        _fit(engine, config, state, data, metrics)
    finally:
        if metrics is not None:
            metrics.close()
        loader.close()
    return 0


def _fit(
    engine: TrainingEngine,
    config: RunConfig,
    state: TrainState,
    data: TrainingData,
    metrics: MetricsWriter | None,
) -> None:
    trainer = Trainer(engine, config, state, data, metrics)
    num_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    start = f"from step {state.step}" if state.step else "from scratch"
    trainer.progress.say(
        f"{config.name}: {num_parameters / 1e6:.2f}M parameters, {engine.mesh.world_size} "
        f"process(es) on {engine.mesh.device.type}, {start} to step {trainer.train_steps}, "
        f"run folder {config.output_dir}"
    )
    trainer.fit()


def check_training_sources(config: RunConfig) -> SourceSummary:
    """Opens every shard index of the run before anything is built.

    Args:
        config: the run.

    Returns:
        What the sources agree on.

    Raises:
        InputError: no training source, or one that is missing, damaged or unfit for the model.
    """
    if not config.data.train:
        raise InputError(
            "data.train = [] has no source; give at least one, as in "
            '"data.train=[{path: SHARD_FOLDER}]"'
        )
    return check_sources(config.data, config.model.vocab_size)


def data_identity(config: RunConfig) -> list[Any]:
    """Says what the training data is, apart from where it lies."""
    identity = []
    for source in config.data.train:
        index = read_index(source.path)
        identity.append([index.num_documents, index.num_tokens, index.tokenizer_sha256])
    return identity


def configure_logging(config: RunConfig, mesh: ParallelMesh) -> logging.Handler:
    """Sends the log of this process to its file in the run folder.

    Args:
        config: the run.
        mesh: ranks of the run.

    Returns:
        The handler, for removal at the end.
    """
    folder = Path(config.output_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank_{mesh.rank:04d}.log", encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s rank {mesh.rank} %(levelname)s %(name)s: %(message)s")
    )
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    return handler
