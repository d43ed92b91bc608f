"""Saves a run: every process writes the slices that it holds, each element once, none gathered.

Order is what makes a checkpoint crash-safe: rank 0 makes an empty folder; files are written and
made durable; their checksums come to rank 0, which writes index, state and, last, the manifest;
only then does the folder get its name. Killed before that, it leaves nothing that looks like one.

Files are written by a thread of each process, which talks to no other one. The main threads ask
theirs after each step, and go from writing to publishing together.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked_values
from megadlcm.checkpoint.flight import Flight, RankWriter
from megadlcm.checkpoint.format import (
    INDEX,
    TOKENIZER,
    FileEntry,
    Manifest,
    rank_file_name,
    write_blocks,
)
from megadlcm.checkpoint.index import Index, Range
from megadlcm.checkpoint.rank_file import Report, Staging, add_fingerprints, as_text
from megadlcm.checkpoint.retention import Retention
from megadlcm.checkpoint.slices import Slice, count_elements, own_slices, whole_shapes
from megadlcm.checkpoint.storage import CheckpointStorage, abandoned_on_error
from megadlcm.config import RunConfig, config_to_dict
from megadlcm.config.training import OPTIMIZERS
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import state_keys
from megadlcm.engine.state import TrainState
from megadlcm.run_folder import files
from megadlcm.run_folder.events import now
from megadlcm.run_folder.owner import check_owner

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.02
_SECONDS_TO_CANCEL = 5.0


class SaveError(StorageError):
    """A save failed on some process; nothing was published."""


@dataclass
class _Save:
    """A save that is under way."""

    name: str
    description: dict[str, Any]
    flight: Flight
    report: Report
    started: float
    is_publishing: bool = False


class Saver:
    """Saves checkpoints of one engine, one after the other.

    Args:
        engine: the engine.
        config: the resolved run.
        storage: where they go.
        attempt: this start of the run.
        tokenizer: contents of the tokenizer's file; a checkpoint has a copy.

    Raises:
        MemoryError: there is no room for the copy that asynchronous saves are written from.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        config: RunConfig,
        storage: CheckpointStorage,
        attempt: str,
        tokenizer: bytes | None = None,
    ) -> None:
        self.engine, self.config, self.options = engine, config, config.checkpoint
        self.storage, self.attempt, self.tokenizer = storage, attempt, tokenizer
        self.previous_step: int | None = None
        self.num_failures = 0
        """Saves in a row that failed."""
        self._shapes = whole_shapes(engine.partition)
        self._held: list[list[Range]] = []
        self._keys: list[str] = []
        self._save: _Save | None = None
        self._waited = 0.0
        staging = self._make_staging() if self.options.asynchronous else None
        rank = engine.mesh.rank
        self._writer = RankWriter(storage, attempt, rank, self._shapes, staging)
        self._retention = Retention(storage, attempt, self.options)
        engine.fences.append(self.fence)

    def _make_staging(self) -> Staging:
        slices = own_slices(self.engine, share=True)
        specs = self.engine.partition.specs
        lengths = {True: 0, False: 0}
        for each in slices:
            lengths[specs[each.part.tensor].is_parameter] += len(each.part)
        states = OPTIMIZERS[self.config.optimizer.name].num_moments
        elements = lengths[False] + (1 + states) * lengths[True]
        staging = Staging(elements, self.engine.mesh.device)
        logger.info("checkpoints are written from a copy of %s bytes", f"{staging.num_bytes:,}")
        return staging

    # -- what the trainer calls; collective, but for the fence ------------------------------------

    def request(self, state: TrainState) -> None:
        """Begins to save the step just completed, and goes on; waits for a save that still runs.

        A failure is logged, `checkpoint.max_failures` of them in a row are an error.

        Args:
            state: counters.

        Raises:
            SaveError: too many saves failed one after the other.
        """
        self.wait()
        self._begin(state, live=not self.options.asynchronous)
        if not self.options.asynchronous:
            self.wait()

    def save(self, state: TrainState) -> str:
        """Commits a checkpoint of the step just completed, before it returns.

        Args:
            state: counters.

        Returns:
            Its name.

        Raises:
            SaveError: it failed on some process, which is named; nothing was published.
        """
        self.wait()
        failures, self.num_failures = self.num_failures, self.options.max_failures - 1
        self._begin(state, live=True)
        self.wait()
        self.num_failures = min(failures, self.num_failures)
        return files.step_name(state.step)

    def tick(self) -> None:
        """To be called after each step: goes on with a save as far as all processes have come."""
        save, mesh = self._save, self.engine.mesh
        if save is None:
            return
        problem = save.flight.find_problem(mesh.rank, self.options.timeout_seconds)
        flags = [float(save.flight.done.is_set()), float(bool(problem))]
        # on the host: nobody waits for a device
        counts = torch.tensor(flags, dtype=torch.float64)
        num_done, num_failed = mesh.sum_everywhere(counts).tolist()
        if num_failed:
            self._give_up([each for each in mesh.gather_over_run(problem) if each])
        elif num_done == mesh.world_size and save.is_publishing:
            self._finish(save)
        elif num_done == mesh.world_size:
            self._start_publishing(save)

    def fence(self) -> None:
        """Returns when the parameters may be changed: a save has its copy of them."""
        if self._save is not None:
            started = time.monotonic()
            self._save.flight.copied.wait()
            self._waited += time.monotonic() - started

    def wait(self) -> None:
        """Returns when no save is under way."""
        started = time.monotonic()
        while self._save is not None:
            self._save.flight.done.wait(_LOOK_SECONDS)
            self.tick()
        self._waited += time.monotonic() - started

    def take_waited_seconds(self) -> float:
        """Seconds for which training waited for saves since this was asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends what still runs on this process, which may be because something failed."""
        if self._save is not None:
            self._save.flight.is_cancelled = True
        self._retention.close()

    # -- one save ---------------------------------------------------------------------------------

    def _begin(self, state: TrainState, live: bool) -> None:
        mesh, name = self.engine.mesh, files.step_name(state.step)
        slices = own_slices(self.engine, share=True)
        keys = self._agree(slices)
        problem = ""
        if mesh.is_writer:
            try:
                self.storage.begin(name, self.attempt, self._num_bytes())
            except (OSError, StorageError, InputError) as error:
                problem = str(error)
        problem = mesh.broadcast_object(problem)
        if problem:
            self._count_failure(name, [problem])
            return
        description = self._description(state)
        # buffers change outside of the optimizer, too: they are tiny, and copied at once
        buffers = {
            name for name, spec in self.engine.partition.specs.items() if not spec.is_parameter
        }
        slices = [
            Slice(each.part, {key: view.clone() for key, view in each.views.items()})
            if each.part.tensor in buffers
            else each
            for each in slices
        ]
        started = time.monotonic()
        flight, report = self._writer.start(name, slices, keys, live)
        report.optimizer_step = description["optimizer_step"]
        self._save = _Save(name, description, flight, report, started)

    def _agree(self, slices: list[Slice]) -> list[str]:
        """Which slices each process holds, asked once: they stay; the kinds of state."""
        mesh = self.engine.mesh
        if not self._held:
            held = [each.part for each in slices]
            gathered = mesh.gather_over_run((held, state_keys(self.engine)[0]))
            self._held = [ranges for ranges, _ in gathered]
            # a stage without parameters has no state
            self._keys = next((keys for _, keys in gathered if keys), [])
        assert [each.part for each in slices] == self._held[mesh.rank], "slices have moved"
        return self._keys

    def _num_bytes(self) -> int:
        return 4 * (1 + len(self._keys)) * count_elements(self.engine.partition)

    def _start_publishing(self, save: _Save) -> None:
        reports: list[Report] = self.engine.mesh.gather_over_run(save.report)

        def work(_: Flight) -> None:
            if self.engine.mesh.is_writer:
                self._publish(save, reports)

        save.flight, save.is_publishing = Flight("checkpoint publish", work).start(), True

    def _publish(self, save: _Save, reports: list[Report]) -> None:
        counts = {each.optimizer_step for each in reports if each.optimizer_step is not None}
        if len(counts) > 1:
            raise SaveError(f"processes count different optimizer steps: {sorted(counts)}")
        partition, name = self.engine.partition, save.name
        num_parameters = sum(spec.is_parameter for spec in partition.specs.values())
        writers = [rank for rank, ranges in enumerate(self._held) if ranges]
        index = Index.of(self._shapes, num_parameters, [self._held[rank] for rank in writers])
        small = {
            INDEX: index.encode(),
            files.STATE: json.dumps(save.description, indent=1, allow_nan=False).encode(),
        }
        if self.tokenizer is not None:
            small[TOKENIZER] = self.tokenizer
        entries = {file: self._put(name, file, content) for file, content in small.items()}
        rank_files = [rank_file_name(rank) for rank in writers]
        for rank, file in zip(writers, rank_files, strict=True):
            entry = reports[rank].entry
            assert entry is not None
            entries[file] = entry
        manifest = Manifest(
            step=save.description["train_state"]["step"],
            run=self.config.name,
            attempt=self.attempt,
            written=now(),
            layout=layout_of(self.engine),
            keys=self._keys,
            num_elements=count_elements(partition),
            rank_files=rank_files,
            files=entries,
            fingerprints=as_text(add_fingerprints([each.fingerprints for each in reports])),
            previous_step=self.previous_step,
        )
        # a start that was taken for dead publishes nothing in the folder of the next one
        check_owner(Path(self.config.output_dir), self.attempt)
        self.storage.publish(name, self.attempt, manifest.encode())

    def _put(self, name: str, file: str, content: bytes) -> FileEntry:
        new = self.storage.create(name, self.attempt, file)
        with abandoned_on_error(new):
            entry = write_blocks(new, [content])
            new.finish()
        return entry

    def _finish(self, save: _Save) -> None:
        self._save, self.num_failures = None, 0
        # only after it is there: the newest good one is never the one that goes
        if self.engine.mesh.is_writer:
            self._retention.after(save.name)
        self.previous_step = save.description["train_state"]["step"]
        seconds = time.monotonic() - save.started
        logger.info("saved checkpoint %s in %.1f s", save.name, seconds)

    def _give_up(self, problems: list[str]) -> None:
        save = self._save
        assert save is not None
        self._save = None
        has_ended = save.flight.cancel(_SECONDS_TO_CANCEL)
        self.engine.mesh.barrier()  # nobody writes into what rank 0 removes
        # one that hangs might publish what is being removed: the next start removes it
        if self.engine.mesh.is_writer and has_ended:
            self.storage.abandon(save.name, self.attempt)  # the room may be needed
        self._count_failure(save.name, problems)

    def _count_failure(self, name: str, problems: list[str]) -> None:
        self.num_failures += 1
        text = f"checkpoint {name} was not saved: {'; '.join(problems)}"
        if self.num_failures >= self.options.max_failures:
            raise SaveError(text)
        logger.warning("training goes on until the next one, although %s", text)

    def _description(self, state: TrainState) -> dict[str, Any]:
        _, step = state_keys(self.engine)
        return {
            # what a resumed run goes on with; the rest is for people and for `check_continuable`
            "train_state": state.to_dict(),
            "optimizer_step": step,
            "config": masked_values(config_to_dict(self.config)),
            "layout": layout_of(self.engine),
            "versions": _versions(),
        }


def layout_of(engine: TrainingEngine) -> dict[str, int]:
    """Sizes of the axes of a run."""
    return {
        "world_size": engine.mesh.world_size,
        "zero_stage": engine.zero_stage,
        "tensor_parallel_size": engine.mesh.tensor_parallel_size,
        "pipeline_parallel_size": engine.mesh.pipeline_parallel_size,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
