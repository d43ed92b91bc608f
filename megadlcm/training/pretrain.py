"""The story of a training run: config -> mesh -> model -> engine -> data -> fit."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.errors import InputError, StorageError
from data_pipeline.output_folder import make_output_folder
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.phases import Phase, first_phase
from data_pipeline.reading.samples import SampleReader
from data_pipeline.reading.sources import SourceSummary, open_sources
from megadlcm.checkpoint.save_and_resume import resume
from megadlcm.config import RunConfig
from megadlcm.engine.engine import build_engine
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import NonFiniteError
from megadlcm.model.language_model import attention_backend
from megadlcm.parallel.environment import choose_device, launch_environment
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import build_stage_model, make_partition
from megadlcm.parallel.process_group import abandon_process_group, join_process_group
from megadlcm.parallel.rendezvous import MissingRanksError
from megadlcm.parallel.watch.watchdog import doing, report_failure
from megadlcm.plan.stages import cut_chunks
from megadlcm.run_folder import files
from megadlcm.run_folder.start import prepare_run_folder
from megadlcm.training.agreement import check_agreement
from megadlcm.training.metrics import MetricsWriter
from megadlcm.training.replica_loader import ReplicaLoader
from megadlcm.training.skipped import SkippedRecord, damaged_shards
from megadlcm.training.trainer import Trainer, TrainingData

logger = logging.getLogger(__name__)

_LOGGERS = ("megadlcm", "data_pipeline")


def run(config: RunConfig) -> int:
    """Trains a run, from its newest complete checkpoint if there is one, to its last step.

    Args:
        config: the resolved run.

    Returns:
        Exit code: 0 done, 1 the loss or a gradient was not finite, or another process is missing.

    Raises:
        InputError: the config, the data or the launcher's environment is wrong.
    """
    # before a process group or a run folder exists
    sources = check_training_sources(config)
    check_launch(config)
    alone = launch_environment().world_size == 1
    damaged = damaged_shards(config) if alone else []
    make_output_folder(Path(config.output_dir), "output_dir =")
    try:
        mesh = join_process_group(config.parallel)
    except MissingRanksError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    handler = configure_logging(config, mesh)
    try:
        check_agreement(config, sources.fingerprints, mesh)
        damaged = damaged if alone else damaged_shards(config, mesh)
        with open_trainer(config, mesh, sources) as trainer:
            trainer.data.skipped.note_shards(damaged)
            _announce(trainer, sources.train_tokens)
            trainer.fit()
        return 0
    except (NonFiniteError, StorageError) as error:
        _leave_others(error)
        logger.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        _leave_others(error)
        logger.error("%s", error)
        raise
    except Exception as error:
        logger.exception("the run failed")
        explained = _leave_others(error)
        if explained is None:
            raise
        logger.error("%s", explained)
        print(f"error: {explained}", file=sys.stderr)
        return 1
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()


def _leave_others(error: Exception) -> str | None:
    """Tells the other processes, and finds out whether one of them is the cause."""
    explained = report_failure(error)
    abandon_process_group()
    return explained


def fresh_state(config: RunConfig) -> TrainState:
    """Returns the counters of a run that has not begun.

    Args:
        config: the run; the indexes of its train sources are read.

    Returns:
        The counters; the data is in its first phase.
    """
    return TrainState(data_phases=[first_phase(config.data).to_dict()])


def open_loader(
    config: RunConfig, mesh: ParallelMesh, state: TrainState | None = None
) -> ReplicaLoader:
    """Opens this process's part of the data.

    Args:
        config: the run.
        mesh: ranks of this process.
        state: where the run stands; None: at its beginning.

    Returns:
        The loader; to be closed.
    """
    state = state or TrainState()
    parallel, loader = config.parallel, None
    if mesh.reads_data:
        phase = Phase.from_dict(state.data_phases[-1]) if state.data_phases else None
        loader = StepLoader(
            config.data,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=mesh.data_parallel_rank,
            data_parallel_size=mesh.data_parallel_size,
            start_sample=state.consumed_samples,
            reader=SampleReader(config.data, phase=phase),
        )
    chunks = cut_chunks(
        config.model,
        config.data.seq_len,
        parallel.pipeline_parallel_size,
        parallel.pipeline_placement,
    )
    return ReplicaLoader(loader, mesh, config.data.seq_len, chunks[0].stage, chunks[-1].stage)


@contextlib.contextmanager
def open_trainer(
    config: RunConfig, mesh: ParallelMesh, sources: SourceSummary | None = None
) -> Iterator[Trainer]:
    """Builds everything that a run needs, resumed if its folder has a checkpoint.

    Args:
        config: the resolved run.
        mesh: ranks of the run; the process group must exist.
        sources: what check_training_sources has found; None looks again.

    Yields:
        The trainer, ready for its next step; loader and metrics are closed afterwards.

    Raises:
        InputError: the data or the checkpoint does not fit the config.
    """
    sources = sources or check_training_sources(config)
    torch.manual_seed(config.seed)
    partition = make_partition(config)
    model = build_stage_model(config, mesh, partition)
    with doing("start of the engine", computes=True):  # broadcasts parameters
        engine = build_engine(model, config, mesh, partition)
    resumed = resume(engine, config)
    state = resumed or fresh_state(config)
    if mesh.is_writer:
        prepare_run_folder(config, resumed is not None)
    with contextlib.ExitStack() as stack:
        loader = open_loader(config, mesh, state)
        stack.callback(loader.close)
        metrics = None
        if mesh.is_writer:
            metrics = MetricsWriter(
                Path(config.output_dir), state.step + 1, config.logging.tensorboard
            )
            stack.callback(metrics.close)
        data = TrainingData(loader, sources.tokenizer, SkippedRecord(config, mesh))
        yield Trainer(engine, config, state, data, metrics)


def _announce(trainer: Trainer, epoch_tokens: int) -> None:
    config, mesh, step = trainer.config, trainer.engine.mesh, trainer.state.step
    model = trainer.engine.model
    start = f"from step {step}" if step else "from scratch"
    trainer.progress.say(
        f"{config.name}: {trainer.engine.num_parameters / 1e6:.2f}M parameters, {mesh.world_size} "
        f"process(es) on {mesh.device.type}, attention back-end {model.backend()}, "
        f"{start} to step {trainer.train_steps}, run folder {config.output_dir}"
    )
    epochs = config.total_steps * config.step_tokens / epoch_tokens
    last = trainer.state.data_phases[-1]
    if trainer.state.step and last["first_sample"] == trainer.state.consumed_samples:
        names = ", ".join(f"{source['name']} {source['weight']:g}" for source in last["sources"])
        trainer.progress.say(
            f"data phase {len(trainer.state.data_phases)} begins at sample "
            f"{last['first_sample']}: {names}"
        )
    trainer.progress.say(
        f"training data: {epoch_tokens:,} tokens an epoch, {epochs:,.2f} epochs in the whole run"
    )
    if step >= trainer.train_steps:
        trainer.progress.say("nothing is left to train; raise training.train_steps to go on")


def check_training_sources(config: RunConfig) -> SourceSummary:
    """Opens every shard index of the run before anything is built.

    Args:
        config: the run.

    Returns:
        Their tokenizer, and how much there is to train on.

    Raises:
        InputError: no training source, or one that is missing, damaged or unfit for the model.
    """
    if not config.data.train:
        raise InputError(
            "data.train = [] has no source; give at least one, as in "
            '"data.train=[{path: SHARD_FOLDER}]"'
        )
    return open_sources(config.data, config.model.vocab_size)


def check_launch(config: RunConfig) -> None:
    """Checks that this process and its launcher can run the config, before it waits for others.

    Args:
        config: the run.

    Raises:
        InputError: a global batch that the processes cannot share, a device that is not there, or
            an attention back-end that cannot run on it.
    """
    launch = launch_environment()
    replicas = config.parallel.data_parallel_size(launch.world_size)
    config.training.gradient_accumulation_steps(replicas)
    device = choose_device(launch.local_rank)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    try:
        attention_backend(config.model, device, dtype)
    except ValueError as error:
        raise InputError(str(error)) from error


def configure_logging(config: RunConfig, mesh: ParallelMesh) -> logging.Handler:
    """Sends the log of this process to its file in the run folder.

    Args:
        config: the run.
        mesh: ranks of the run.

    Returns:
        The handler, for removal at the end.
    """
    folder = Path(config.output_dir) / files.LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / files.rank_log(mesh.rank), encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s rank {mesh.rank} %(levelname)s %(name)s: %(message)s")
    )
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    return handler
