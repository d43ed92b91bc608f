"""The story of a training run: config -> mesh -> model -> engine -> data -> fit."""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked
from data_pipeline.output_folder import make_output_folder, reading_and_writing
from data_pipeline.quotas import MAX_PERIOD, rounded_shares
from data_pipeline.reading.sources import SourceSummary
from data_pipeline.tables import printable
from megadlcm.checkpoint.folder import storage_of
from megadlcm.checkpoint.resume import fresh_state, resume
from megadlcm.checkpoint.save import Saver
from megadlcm.config import RunConfig
from megadlcm.engine.engine import build_engine
from megadlcm.engine.step import NonFiniteError
from megadlcm.parallel.environment import launch_environment
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import build_stage_model, make_partition
from megadlcm.parallel.process_group import abandon_process_group, join_process_group
from megadlcm.parallel.rendezvous import RendezvousError
from megadlcm.parallel.watch.activity import doing
from megadlcm.parallel.watch.watchdog import first_line, report_failure
from megadlcm.run_folder.owner import holding
from megadlcm.run_folder.start import check_run_folder, prepare_run_folder
from megadlcm.training.checks import check_agreement, check_launch, check_training_sources
from megadlcm.training.logs import rank_log
from megadlcm.training.metrics import MetricsWriter
from megadlcm.training.replica_loader import open_loader
from megadlcm.training.skipped import SkippedRecord, damaged_shards
from megadlcm.training.trainer import Trainer, TrainingData

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Trains a run, from its newest complete checkpoint if there is one, to its last step.

    Args:
        config: the resolved run.

    Returns:
        Exit code: 0 done, 1 the loss or a gradient was not finite, or another process is missing.

    Raises:
        InputError: the config, the data or the launcher's environment is wrong.
    """
    # before a process group or a run folder exists: wrong input leaves nothing behind
    sources = check_training_sources(config)
    check_launch(config)
    storage_of(config)
    alone = launch_environment().world_size == 1
    # alone it costs nothing to look now; several processes share the look, which needs the group
    damaged = damaged_shards(config) if alone else []
    folder = Path(config.output_dir)
    make_output_folder(folder, "output_dir =")
    try:
        mesh = join_process_group(config.parallel, config.name)
    except RendezvousError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        try:
            # the log is opened by who holds the folder, and closed after the last words
            held = stack.enter_context(_run_folder(config, mesh))
            stack.enter_context(rank_log(config, mesh))
            for line in held.warnings:
                logger.warning("%s", line)
                print(f"warning: {printable(line)}", file=sys.stderr)
            check_agreement(config, sources.fingerprints, mesh)
            damaged = damaged if alone else damaged_shards(config, mesh)
            # a net below those who know what they write
            opened = open_trainer(config, mesh, sources, held.attempt)
            with reading_and_writing(folder), opened as trainer:
                trainer.data.skipped.note_shards(damaged)
                _announce(trainer, sources.train_tokens)
                trainer.fit()
            return 0
        except Exception as error:
            return _exit_code(error)


@dataclass(frozen=True)
class _Held:
    """A run folder that this start holds."""

    attempt: str
    """The start, told apart from every other one."""
    warnings: list[str]
    """What the log should say of it."""


@contextlib.contextmanager
def _run_folder(config: RunConfig, mesh: ParallelMesh) -> Iterator[_Held]:
    """Holds the run folder for all processes of the run; collective.

    Yields:
        What is to be known of it.

    Raises:
        InputError: on every process, where another start holds it or it cannot be written.
    """
    folder, warnings = Path(config.output_dir), list[str]()
    with contextlib.ExitStack() as stack:
        refused: Exception | None = None
        attempt = ""
        if mesh.is_writer:
            try:
                attempt = stack.enter_context(holding(folder, warnings.append)).attempt
                check_run_folder(folder)
            except Exception as error:  # whatever it is: the others wait for the answer
                refused = error
        told, attempt = mesh.broadcast_object((_as_told(refused, folder), attempt))
        if (failure := refused or told) is not None:
            raise failure
        yield _Held(attempt, warnings)


def _as_told(error: Exception | None, folder: Path) -> Exception | None:
    """An error of this process as another one can be told: as one line."""
    if error is None or isinstance(error, InputError | StorageError):
        return error
    return StorageError(f"output_dir = {folder}: rank 0 failed: {first_line(error)}")


def _exit_code(error: Exception) -> int:
    """Says why the run ends, to this process's log and to the others, who may be the cause.

    Raises:
        Exception: the error itself, where the command line has more to say of it.
    """
    is_plain = isinstance(error, NonFiniteError | StorageError | InputError)
    if not is_plain:
        logger.exception("the run failed")
    explained = _leave_others(error)
    if is_plain:
        explained = str(error)
    # before there is a log the line would go to the screen, where it is said once more
    if explained is not None and logger.hasHandlers():
        logger.error("%s", explained)
    if explained is None or isinstance(error, InputError):
        raise error
    print(f"error: {printable(explained)}", file=sys.stderr)
    return 1


def _leave_others(error: Exception) -> str | None:
    """Tells the other processes, and finds out whether one of them is the cause."""
    explained = report_failure(error)
    abandon_process_group()
    return explained


@contextlib.contextmanager
def open_trainer(
    config: RunConfig,
    mesh: ParallelMesh,
    sources: SourceSummary | None = None,
    attempt: str | None = None,
) -> Iterator[Trainer]:
    """Builds everything that a run needs, resumed if its folder has a checkpoint.

    Args:
        config: the resolved run.
        mesh: ranks of the run; the process group must exist.
        sources: what check_training_sources has found; None looks again.
        attempt: this start of the run, which holds the run folder; None for one that nobody holds.

    Yields:
        The trainer, ready for its next step; loader and metrics are closed afterwards.

    Raises:
        InputError: the data or the checkpoint does not fit the config.
    """
    sources = sources or check_training_sources(config)
    # values, boundaries and data have generators of their own; this is for what libraries draw
    torch.manual_seed(config.seed)
    partition = make_partition(config)
    model = build_stage_model(config, mesh, partition)
    with doing("start of the engine", computes=True):  # broadcasts parameters
        engine = build_engine(model, config, mesh, partition)
    storage = storage_of(config)
    if mesh.is_writer:
        for problem in storage.tidy():
            logger.warning("%s", problem)
    state = resume(engine, config, storage) or fresh_state(config)
    attempt = attempt or mesh.broadcast_object(uuid.uuid4().hex)
    # only now: a start that is refused must not touch the run that is there
    if mesh.is_writer:
        prepare_run_folder(config)
    with contextlib.ExitStack() as stack:
        saver = Saver(engine, config, storage, attempt, sources.tokenizer.contents)
        stack.callback(saver.close)
        loader = open_loader(config, mesh, state)
        stack.callback(loader.close)
        metrics = None
        if mesh.is_writer:
            metrics = MetricsWriter(
                Path(config.output_dir), state.step + 1, config.logging.tensorboard
            )
            stack.callback(metrics.close)
        data = TrainingData(loader, sources.tokenizer, SkippedRecord(config, mesh))
        yield Trainer(engine, config, state, data, metrics, saver)


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
    for split in ("train", "valid"):
        for number, source in enumerate(config.data.sources(split)):
            if masked(source.path) != source.path:
                trainer.progress.say(
                    f"data.{split}[{number}].path holds a password. It is masked in what is shown "
                    "and saved; leave it to ~/.netrc, or to variables such as "
                    "AWS_SECRET_ACCESS_KEY, and name the URL without it"
                )
    if rounded := rounded_shares(config.data.train):
        trainer.progress.say(
            f"data.train weights are met in whole samples of {MAX_PERIOD}: {', '.join(rounded)}"
        )
    if step >= trainer.train_steps:
        trainer.progress.say("nothing is left to train; raise training.train_steps to go on")
