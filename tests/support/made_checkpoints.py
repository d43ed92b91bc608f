"""Checkpoints that no engine wrote, of any size and number of files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megadlcm.checkpoint.converting import share_out
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
from megadlcm.checkpoint.storage import CheckpointStorage, LocalStorage
from megadlcm.run_folder import files

SMALL: dict[str, Shape] = {"embedding": (50, 8), "norm": (8,), "head": (8, 50), "threshold": ()}
KEYS = ["exp_avg", "exp_avg_sq"]
NOW = "2026-11-28T00:00:00+00:00"


def values_of(step: int, name: str, key: str, start: int, stop: int) -> NDArray[np.float32]:
    """Elements of a tensor, another number for each place, kind and step."""
    seed = sum(map(ord, name + key)) + 7919 * step
    places = np.arange(start, stop, dtype=np.uint64)
    mixed = (places + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    return mixed.astype(np.float32)


def make_checkpoint(
    root: Path,
    step: int,
    shapes: dict[str, Shape] = SMALL,
    num_files: int = 2,
    num_buffers: int = 1,
    storage: CheckpointStorage | None = None,
    **changes: Any,
) -> Path:
    """Writes a checkpoint, its tensors one after the other over the files; its folder.

    Args:
        root: the folder `checkpoints`.
        step: of the checkpoint.
        shapes: of its tensors, buffers last.
        num_files: that they are shared out over.
        num_buffers: how many of the tensors have no optimizer state.
        storage: what writes it; None for that of the folder.
        changes: entries of the manifest.
    """
    storage, name = storage or LocalStorage(root), files.step_name(step)
    maker = _Maker(storage, step, shapes, list(shapes)[: len(shapes) - num_buffers])
    storage.begin(name, maker.attempt, 0)
    held = share_out(shapes, num_files)
    index = Index.of(shapes, len(maker.parameters), held)
    sizes = index.array_sizes(len(held), KEYS)
    for number, ranges in enumerate(held):
        header = rank_file_header(sizes[number])
        maker.put(rank_file_name(number), maker.contents(header, ranges))
    maker.put(INDEX, [index.encode()])
    maker.put(files.STATE, [json.dumps(_description(step, num_files)).encode()])
    fingerprints = {
        each: [f"{value % 2**64:016x}" for value in sums] for each, sums in maker.sums.items()
    }
    manifest = Manifest(
        step=step,
        run="made",
        attempt=maker.attempt,
        written=NOW,
        layout=_layout(num_files),
        keys=KEYS,
        num_elements=sum(len(part) for ranges in held for part in ranges),
        rank_files=[rank_file_name(number) for number in range(num_files)],
        files=maker.entries,
        fingerprints=fingerprints,
    )
    storage.publish(name, maker.attempt, replace(manifest, **changes).encode())
    return root / name


def _layout(num_files: int) -> dict[str, int]:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "zero_stage": 1}
    return {"world_size": num_files} | sizes


def _description(step: int, num_files: int) -> dict[str, Any]:
    return {
        "train_state": {"step": step, "consumed_samples": 4 * step},
        "optimizer_step": step,
        "config": {"name": "made"},
        "layout": _layout(num_files),
        "versions": {"torch": "0"},
    }


@dataclass
class _Maker:
    storage: CheckpointStorage
    step: int
    shapes: dict[str, Shape]
    parameters: list[str]

    def __post_init__(self) -> None:
        self.attempt = uuid.uuid4().hex
        self.entries: dict[str, FileEntry] = {}
        self.sums: dict[str, list[int]] = {each: [0, 0, 0] for each in self.shapes}

    def put(self, file: str, parts: Iterable[Any]) -> None:
        new = self.storage.create(files.step_name(self.step), self.attempt, file)
        self.entries[file] = write_blocks(new, parts)
        new.finish()

    def contents(self, header: bytes, ranges: list[Range]) -> Iterator[Any]:
        yield header
        for column, key in enumerate((MASTER, *KEYS)):
            for part in ranges:
                if key == MASTER or part.tensor in self.parameters:
                    values = values_of(self.step, part.tensor, key, part.start, part.stop)
                    own = fingerprint(values, part, self.shapes[part.tensor])
                    self.sums[part.tensor][column] += own
                    yield values.data.cast("B")
