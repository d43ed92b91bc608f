"""Writes a checkpoint anew, block by block: shared out over other files, or as whole tensors.

What is read is verified, and every tensor's fingerprint is that of the source before the new folder
gets its name. Killed at any moment, nothing is left that looks like a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import InputError
from megadlcm.checkpoint.fingerprint import fingerprint
from megadlcm.checkpoint.folder import Checkpoint, step_of
from megadlcm.checkpoint.format import (
    FORMAT,
    INDEX,
    MASTER,
    TOKENIZER,
    FileEntry,
    fp32_header,
    rank_file_header,
    rank_file_name,
    write_blocks,
)
from megadlcm.checkpoint.index import Index, Range, Shape
from megadlcm.checkpoint.reading import BlockReader, ReadJob, jobs_for
from megadlcm.checkpoint.storage import (
    CheckpointStorage,
    LocalStorage,
    NewFile,
    abandoned_on_error,
    read_whole,
)
from megadlcm.run_folder import files
from megadlcm.run_folder.events import now

_BATCH_ELEMENTS = 1 << 22
"""That are read and written at a time."""
Watch = Callable[[int], None]
"""Called with each number of bytes that was written."""


def convert_to_files(
    source: Checkpoint, target: Path, num_files: int, watch: Watch = lambda _: None
) -> None:
    """Writes a checkpoint with its elements shared out over so many files.

    Args:
        source: what is read.
        target: the new checkpoint folder, which is not there yet.
        num_files: how many; each gets as many elements as the next.
        watch: sees how far it is.

    Raises:
        InputError: the source is damaged, or the target cannot be made.
        StorageError: the disk does not take it.
    """
    shared = share_out(source.index.shapes, num_files)
    held = [part for part in shared if part]  # a small model does not fill them all
    index = Index.of(source.index.shapes, source.index.num_parameters, held)
    writer = _Writer(source, target, source.manifest.keys, watch)
    with writer:
        entries = {}
        sizes = index.array_sizes(len(held), source.manifest.keys)
        for number, ranges in enumerate(held):
            items = [
                (part, key)
                for key in (MASTER, *source.manifest.keys)
                for part in ranges
                if key == MASTER or writer.is_parameter(part.tensor)
            ]
            header = rank_file_header(sizes[number])
            name = rank_file_name(number)
            entries[name] = writer.put(name, [header], items)
        rank_files = list(entries)
        entries[INDEX] = writer.put(INDEX, [index.encode()])
        entries |= writer.put_small_files(source.description)
        manifest = replace(
            source.manifest,
            written=now(),
            rank_files=rank_files,
            files=entries,
            fingerprints=writer.checked_fingerprints(),
            layout=source.manifest.layout or source.description.get("layout", {}),
            format=FORMAT,
        )
        writer.publish(manifest.encode())


def convert_to_whole_tensors(
    source: Checkpoint, target: Path, with_optimizer: bool, watch: Watch = lambda _: None
) -> None:
    """Writes whole tensors by name as safetensors: `model.safetensors`, and the optimizer's.

    The folder is a checkpoint of the first format, so it can be loaded, verified and shared out.

    Args:
        source: what is read.
        target: the new folder, which is not there yet.
        with_optimizer: whether `optimizer.safetensors` is written too.
        watch: sees how far it is.

    Raises:
        InputError: the source is damaged, or the target cannot be made.
        StorageError: the disk does not take it.
    """
    keys = source.manifest.keys if with_optimizer else []
    shapes = source.index.shapes
    writer = _Writer(source, target, keys, watch, is_hashing=True)
    whole = {name: Range.whole(name, shape) for name, shape in shapes.items()}
    states = {
        f"{name}.{key}": (whole[name], key)
        for name in shapes
        if writer.is_parameter(name)
        for key in keys
    }
    with writer:
        model = [(part, MASTER) for part in whole.values()]
        entries = {files.MODEL: writer.put(files.MODEL, [fp32_header(shapes)], model)}
        if states:
            header = fp32_header({name: shapes[part.tensor] for name, (part, _) in states.items()})
            entries[files.OPTIMIZER] = writer.put(files.OPTIMIZER, [header], states.values())
        # a count without the state that was counted would be none
        step = source.description.get("optimizer_step") if with_optimizer else None
        entries |= writer.put_small_files(source.description | {"optimizer_step": step})
        manifest = {
            "step": source.step,
            "written": now(),
            "files": {
                name: {"bytes": entry.size, "sha256": writer.sha256[name]}
                for name, entry in entries.items()
            },
            "fingerprints": writer.checked_fingerprints(),
        }
        writer.publish(json.dumps(manifest, indent=1).encode())


def share_out(shapes: dict[str, Shape], num_files: int) -> list[list[Range]]:
    """Cuts the elements of all tensors, one after another, into files of nearly equal size."""
    whole = [Range.whole(name, shape) for name, shape in shapes.items()]
    total = sum(map(len, whole))
    borders = [total * number // num_files for number in range(num_files + 1)]
    shared: list[list[Range]] = []
    for low, high in pairwise(borders):
        begin, ranges = 0, []
        for part in whole:
            start, stop = max(low - begin, 0), min(high - begin, len(part))
            if start < stop:
                ranges.append(replace(part, start=start, stop=stop))
            begin += len(part)
        shared.append(ranges)
    return shared


@dataclass
class _Writer:
    """Writes the files of one new checkpoint folder; a context manager that leaves all or none."""

    source: Checkpoint
    target: Path
    keys: Sequence[str]
    """Kinds of state that are written."""
    watch: Watch
    is_hashing: bool = False
    """Whether the SHA-256 of each file is wanted, which takes longer than all the rest."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Of each file that was written."""

    def __post_init__(self) -> None:
        check_target(self.source, self.target)
        self._storage: CheckpointStorage = LocalStorage(self.target.parent, has_latest=False)
        self._attempt = uuid.uuid4().hex
        self._is_published = False
        self._sums: dict[tuple[str, str], int] = {}
        self._reader = BlockReader(
            self.source.storage, self.source.name, self.source.manifest.files
        )
        index = self.source.index
        self._parameters = set(index.names[: index.num_parameters])

    def __enter__(self) -> _Writer:
        num_bytes = 4 * (1 + len(self.keys)) * self.source.manifest.num_elements
        try:
            self._storage.begin(self.target.name, self._attempt, num_bytes)
        except OSError as error:
            raise InputError(
                f"{self.target} cannot be made ({error.strerror or error}); choose another folder"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_published:
            self._storage.abandon(self.target.name, self._attempt)

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor has optimizer state; the others are buffers."""
        return name in self._parameters

    def put(
        self, name: str, before: Iterable[bytes], items: Iterable[tuple[Range, str]] = ()
    ) -> FileEntry:
        """Writes a file: some bytes, then ranges of the source, masters or kinds of state."""
        file = self._storage.create(self.target.name, self._attempt, name)
        sink = _Sink(file, self.watch, hashlib.sha256() if self.is_hashing else None)
        with abandoned_on_error(file):
            entry = write_blocks(sink, self._contents(before, items))
            file.finish()
        if sink.digest is not None:
            self.sha256[name] = sink.digest.hexdigest()
        return entry

    def _contents(
        self, before: Iterable[bytes], items: Iterable[tuple[Range, str]]
    ) -> Iterator[memoryview | bytes]:
        yield from before
        buffer = np.empty(_BATCH_ELEMENTS, np.float32)
        for batch in _batches(items):
            jobs: list[ReadJob] = []
            places: list[NDArray[np.float32]] = []
            end = 0
            for part, key in batch:
                begin, end = end, end + len(part)
                places.append(buffer[begin:end])
                jobs += jobs_for(self.source, part, key, places[-1])
            self._read(jobs)
            for (part, key), values in zip(batch, places, strict=True):
                self._add(part, key, values)
            yield buffer[:end].data.cast("B")

    def _read(self, jobs: list[ReadJob]) -> None:
        try:
            self._reader.run(jobs)
        except (InputError, OSError) as error:
            text = f"checkpoint {self.source.name}: {error}; name another one"
            raise InputError(text) from error

    def _add(self, part: Range, key: str, values: NDArray[np.float32]) -> None:
        own = fingerprint(values, part, self.source.index.shapes[part.tensor])
        before = self._sums.get((part.tensor, key), 0)
        self._sums[part.tensor, key] = (before + own) % 2**64

    def checked_fingerprints(self) -> dict[str, list[str]]:
        """Fingerprints of what was written, as a manifest has them.

        Raises:
            InputError: the source says others.
        """
        columns = (MASTER, *self.source.manifest.keys)
        for name, expected in self.source.manifest.fingerprints.items():
            for key, text in zip(columns, expected, strict=True):
                if self._sums.get((name, key), int(text, 16)) != int(text, 16):
                    raise InputError(
                        f"checkpoint {self.source.name}: {key} of tensor {name} has another "
                        "fingerprint than its manifest says; name another one"
                    )
        return {
            name: [f"{self._sums.get((name, key), 0):016x}" for key in (MASTER, *self.keys)]
            for name in self.source.index.names
        }

    def put_small_files(self, description: dict[str, object]) -> dict[str, FileEntry]:
        """Writes `state.json`, and the tokenizer where the source has one."""
        text = json.dumps(description, indent=1, allow_nan=False).encode()
        entries = {files.STATE: self.put(files.STATE, [text])}
        entry = self.source.manifest.files.get(TOKENIZER)
        if entry is not None:
            content = read_whole(self.source.storage, self.source.name, TOKENIZER, entry.size)
            entries[TOKENIZER] = self.put(TOKENIZER, [content])
            if entries[TOKENIZER] != entry:
                raise InputError(f"checkpoint {self.source.name}: {TOKENIZER} is damaged")
        return entries

    def publish(self, manifest: bytes) -> None:
        """Gives the folder its name."""
        check_target(self.source, self.target)
        self._storage.publish(self.target.name, self._attempt, manifest)
        self._is_published = True


def check_target(source: Checkpoint, target: Path) -> None:
    """Refuses a place for a new checkpoint folder that is taken, or whose name says another step.

    Raises:
        InputError: it cannot be made there.
    """
    step = step_of(target.name)
    if step is not None and step != source.step:
        raise InputError(
            f"{target}: its name says step {step}, and {source.name} holds step {source.step}; "
            f"choose {files.step_name(source.step)}, or a name without a step"
        )
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists, must be a new folder; choose another one")


@dataclass
class _Sink:
    """A file whose bytes are counted, and digested where that is wanted."""

    file: NewFile
    watch: Watch
    digest: hashlib._Hash | None

    def write(self, block: memoryview | bytes) -> None:
        if self.digest is not None:
            self.digest.update(block)
        self.file.write(block)
        self.watch(len(block))


def _batches(items: Iterable[tuple[Range, str]]) -> Iterator[list[tuple[Range, str]]]:
    """Neighbours that together fill a buffer; long ranges are cut."""
    batch: list[tuple[Range, str]] = []
    room = _BATCH_ELEMENTS
    for part, key in items:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            batch.append((replace(part, start=start, stop=stop), key))
            room -= stop - start
            start = stop
            if not room:
                yield batch
                batch, room = [], _BATCH_ELEMENTS
    if batch:
        yield batch
