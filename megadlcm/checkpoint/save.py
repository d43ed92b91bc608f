"""Saves a run: every process writes the slices that it holds, each element once, none gathered.

Order is what makes a checkpoint crash-safe: rank 0 makes an empty folder; files are written and
made durable; their checksums come to rank 0, which writes index, state and, last, the manifest;
only then does the folder get its name. Killed before that, it leaves nothing that looks like one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked_values
from megadlcm.checkpoint.fingerprint import fingerprint
from megadlcm.checkpoint.format import (
    INDEX,
    MASTER,
    FileEntry,
    Manifest,
    rank_file_header,
    rank_file_name,
    write_blocks,
)
from megadlcm.checkpoint.index import Index, Range, Shape
from megadlcm.checkpoint.retention import prune
from megadlcm.checkpoint.slices import Slice, count_elements, own_slices, whole_shapes
from megadlcm.checkpoint.storage import CheckpointStorage
from megadlcm.config import RunConfig, config_to_dict
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import state_keys
from megadlcm.engine.state import TrainState
from megadlcm.run_folder import files
from megadlcm.run_folder.events import now
from megadlcm.run_folder.owner import check_owner

logger = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 1 << 23
"""Of a tensor on a device, copied to the host at a time."""
Fingerprints = dict[str, list[int]]


class SaveError(StorageError):
    """A save failed on some process; nothing was published."""


@dataclass
class Report:
    """What a process says when it has written its file."""

    entry: FileEntry | None = None
    """Of its file; None where it holds nothing."""
    fingerprints: Fingerprints = field(default_factory=dict)
    """Of its slices, by tensor: master, then each kind of state."""
    problem: str = ""
    """Why it failed."""


class Saver:
    """Saves checkpoints of one engine.

    Args:
        engine: the engine.
        config: the resolved run.
        storage: where they go.
        attempt: this start of the run.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        config: RunConfig,
        storage: CheckpointStorage,
        attempt: str,
    ) -> None:
        self.engine, self.config = engine, config
        self.storage, self.attempt = storage, attempt
        self.previous_step: int | None = None
        self._held: list[list[Range]] = []
        self._keys: list[str] = []

    def save(self, state: TrainState) -> str:
        """Commits a checkpoint of the step just completed; collective.

        Args:
            state: counters.

        Returns:
            Its name.

        Raises:
            SaveError: it failed on some process, which is named; nothing was published.
        """
        mesh, name = self.engine.mesh, files.step_name(state.step)
        slices = own_slices(self.engine, share=True)
        keys = self._agree(slices)
        self._on_writer(lambda: self.storage.begin(name, self.attempt, self._num_bytes(keys)))
        report = self._write(name, slices, keys)
        reports: list[Report] = mesh.gather_over_run(report)
        try:
            self._on_writer(lambda: self._publish(name, state, keys, reports))
        except SaveError:
            if mesh.is_writer:
                self.storage.abandon(name, self.attempt)  # the room may be needed
            raise
        self.previous_step = state.step
        return name

    def _on_writer(self, act: Callable[[], None]) -> None:
        """Does something on rank 0; all learn whether it went well."""
        problem = ""
        if self.engine.mesh.is_writer:
            try:
                act()
            except (OSError, StorageError, InputError) as error:
                problem = str(error)
        problem = self.engine.mesh.broadcast_object(problem)
        if problem:
            raise SaveError(problem)

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

    def _num_bytes(self, keys: list[str]) -> int:
        return 4 * (1 + len(keys)) * count_elements(self.engine.partition)

    def _write(self, name: str, slices: list[Slice], keys: list[str]) -> Report:
        """Writes the file of this process."""
        report = Report()
        if not slices:
            return report
        rank = self.engine.mesh.rank
        try:
            file = self.storage.create(name, self.attempt, rank_file_name(rank))
            with contextlib.ExitStack() as stack:
                stack.callback(file.abandon)
                report.entry = write_blocks(file, _contents(slices, keys, report, self._shapes))
                file.finish()
                stack.pop_all()
        except (OSError, StorageError) as error:
            report.problem = f"rank {rank}: {error}"
        return report

    @property
    def _shapes(self) -> dict[str, Shape]:
        return whole_shapes(self.engine.partition)

    def _publish(
        self, name: str, state: TrainState, keys: list[str], reports: list[Report]
    ) -> None:
        problems = [report.problem for report in reports if report.problem]
        if problems:
            raise SaveError("; ".join(problems))
        partition = self.engine.partition
        num_parameters = sum(spec.is_parameter for spec in partition.specs.values())
        writers = [rank for rank, ranges in enumerate(self._held) if ranges]
        index = Index.of(self._shapes, num_parameters, [self._held[rank] for rank in writers])
        entries = {INDEX: self._put(name, INDEX, index.encode())}
        text = json.dumps(self._description(state, self.engine), indent=1)
        entries[files.STATE] = self._put(name, files.STATE, text.encode())
        rank_files = [rank_file_name(rank) for rank in writers]
        for rank, file in zip(writers, rank_files, strict=True):
            entry = reports[rank].entry
            assert entry is not None
            entries[file] = entry
        manifest = Manifest(
            step=state.step,
            run=self.config.name,
            attempt=self.attempt,
            written=now(),
            layout=layout_of(self.engine),
            keys=keys,
            num_elements=count_elements(partition),
            rank_files=rank_files,
            files=entries,
            fingerprints=as_text(add_fingerprints([each.fingerprints for each in reports])),
            previous_step=self.previous_step,
        )
        check_owner(Path(self.config.output_dir), self.attempt)
        self.storage.publish(name, self.attempt, manifest.encode())
        # only after it is there: the newest good one is never the one that goes
        prune(self.storage, self.attempt, name, self.config.checkpoint.keep)

    def _put(self, name: str, file: str, content: bytes) -> FileEntry:
        new = self.storage.create(name, self.attempt, file)
        with contextlib.ExitStack() as stack:
            stack.callback(new.abandon)
            entry = write_blocks(new, [content])
            new.finish()
            stack.pop_all()
        return entry

    def _description(self, state: TrainState, engine: TrainingEngine) -> dict[str, Any]:
        _, step = state_keys(engine)
        return {
            # what a resumed run goes on with; the rest is for people and for `check_continuable`
            "train_state": state.to_dict(),
            "optimizer_step": step,
            "config": masked_values(config_to_dict(self.config)),
            "layout": layout_of(engine),
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


def _contents(
    slices: list[Slice], keys: list[str], report: Report, shapes: Mapping[str, Shape]
) -> Iterator[memoryview | bytes]:
    """The bytes of a rank file; its fingerprints come by the way, while they are in the cache."""
    sizes = {
        key: sum(len(each.part) for each in slices if key in each.views) for key in (MASTER, *keys)
    }
    yield rank_file_header(sizes)
    for column, key in enumerate((MASTER, *keys)):
        for each in slices:
            if key not in each.views:
                continue
            sums = report.fingerprints.setdefault(each.part.tensor, [0] * (1 + len(keys)))
            for start, values in host_chunks(each.views[key]):
                part = Range(
                    each.part.tensor,
                    each.part.piece,
                    each.part.start + start,
                    each.part.start + start + len(values),
                )
                own = fingerprint(values, part, shapes[each.part.tensor])
                sums[column] = (sums[column] + own) % 2**64
                yield memoryview(values).cast("B")


def host_chunks(view: Tensor) -> Iterator[tuple[int, Any]]:
    """A tensor in parts of moderate size, as numpy arrays; first element and part."""
    for start in range(0, view.numel(), _CHUNK_ELEMENTS):
        part = view[start : start + _CHUNK_ELEMENTS]
        assert part.dtype == torch.float32
        yield start, np.ascontiguousarray(part.cpu().numpy())


def add_fingerprints(parts: list[Fingerprints]) -> Fingerprints:
    """Adds what processes computed of their slices."""
    total: Fingerprints = {}
    for part in parts:
        for name, sums in part.items():
            before = total.setdefault(name, [0] * len(sums))
            total[name] = [(a + b) % 2**64 for a, b in zip(before, sums, strict=True)]
    return total


def as_text(fingerprints: Fingerprints) -> dict[str, list[str]]:
    """Fingerprints as the manifest has them."""
    return {name: [f"{value:016x}" for value in sums] for name, sums in fingerprints.items()}


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
