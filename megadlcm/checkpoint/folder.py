"""Checkpoints of a run: which there are, which can be trusted, and what is in them. Files only."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import is_remote
from megadlcm.checkpoint import earlier_format
from megadlcm.checkpoint.format import (
    BLOCK_BYTES,
    INDEX,
    FileEntry,
    Manifest,
    block_problem,
    rank_file_header,
)
from megadlcm.checkpoint.index import Index
from megadlcm.checkpoint.storage import (
    CheckpointStorage,
    LocalStorage,
    read_whole,
)
from megadlcm.config import RunConfig
from megadlcm.config.yaml_text import read_yaml
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed the quick check."""

    storage: CheckpointStorage
    """Where it lies."""
    name: str
    """Of its folder."""
    manifest: Manifest
    """What it vouches for."""
    index_bytes: bytes
    """`index.safetensors`."""
    description: dict[str, Any]
    """`state.json`."""
    places: Mapping[tuple[int, str], tuple[str, int]]
    """Where the array of a file number and key begins: file name and byte."""

    @cached_property
    def index(self) -> Index:
        """Where each slice lies."""
        return Index.decode(self.index_bytes)

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.manifest.step

    def __str__(self) -> str:
        return self.name


def storage_of(run: RunConfig | str | Path) -> CheckpointStorage:
    """Where the checkpoints of a run lie.

    Args:
        run: its config; its run folder, whose config.yaml says where; or the URL itself.

    Raises:
        InputError: checkpoint.folder is a URL to which nothing can be written.
    """
    if isinstance(run, RunConfig):
        folder, place = Path(run.output_dir), run.checkpoint.folder
    elif is_remote(run):
        return storage_at(str(run))
    else:
        folder, place = Path(run), saved_place(Path(run))
    return LocalStorage(folder / files.CHECKPOINTS) if place is None else storage_at(place)


def saved_place(run_folder: Path) -> str | None:
    """The `checkpoint.folder` of the last start of a run; None for its default."""
    path = run_folder / files.CONFIG
    section = read_yaml(path).get("checkpoint") if path.is_file() else None
    place = section.get("folder") if isinstance(section, dict) else None
    return place if isinstance(place, str) else None


def storage_at(place: str) -> CheckpointStorage:
    """Checkpoints in a folder, or below a URL."""
    if not is_remote(place):
        return LocalStorage(Path(place.removeprefix("file://")))
    # takes longer to load than all the rest: not for who reads a folder
    from megadlcm.checkpoint.object_storage import ObjectStorage

    return ObjectStorage(place)


def step_of(name: str) -> int | None:
    """The step that a folder's name says; None for another name."""
    match = re.fullmatch(files.STEP_PATTERN, name)
    return None if match is None else int(match[1])


def open_checkpoint(storage: CheckpointStorage, name: str) -> Checkpoint:
    """Checks what can be checked without reading the tensors.

    Args:
        storage: where it lies.
        name: of its folder.

    Returns:
        The checkpoint: manifest, index and state are whole, and each file has its size.

    Raises:
        InputError: it is damaged, or of a later version; the line says how.
    """
    manifest, whole = _look(storage, name)
    optimizer_step = None
    with _named_errors(f"{files.STATE} is damaged"):
        if whole is not None:
            tensors = earlier_format.read(storage, name, whole)
            manifest, places = tensors.manifest, tensors.places
            index_bytes, optimizer_step = tensors.index.encode(), tensors.optimizer_step
        else:
            index_bytes = _read_file(storage, name, INDEX, manifest)
            places = _places(Index.decode(index_bytes), manifest)
        description = json.loads(_read_file(storage, name, files.STATE, manifest))
        if not isinstance(description, dict) or "train_state" not in description:
            raise InputError(f"{files.STATE} is no description of a checkpoint")
    if optimizer_step is not None:
        description["optimizer_step"] = optimizer_step
    return Checkpoint(storage, name, manifest, index_bytes, description, places)


def quick_look(storage: CheckpointStorage, name: str) -> Manifest:
    """Reads what a checkpoint says of itself, and looks whether its files have their sizes.

    Args:
        storage: where it lies.
        name: of its folder.

    Returns:
        Its manifest.

    Raises:
        InputError: it is damaged, or of a later version; the line says how.
    """
    return _look(storage, name)[0]


def _look(storage: CheckpointStorage, name: str) -> tuple[Manifest, dict[str, Any] | None]:
    """The manifest, of the first format also its text."""
    try:
        content = storage.manifest(name)
    except FileNotFoundError as error:
        raise InputError(f"{files.MANIFEST} is missing") from error
    except (OSError, StorageError) as error:
        raise InputError(f"{files.MANIFEST} cannot be read ({_reason(error)})") from error
    with _named_errors(f"{files.MANIFEST} is damaged"):
        whole = earlier_format.files_of(content)
        outline = earlier_format.outline
        manifest = _decoded_manifest(content) if whole is None else outline(whole)
        named = step_of(name)
        if named is not None and named != manifest.step:
            raise InputError(f"it holds step {manifest.step}: the folder was renamed")
        _check_sizes(storage, name, manifest.files)
    return manifest, whole


@contextlib.contextmanager
def _named_errors(damage: str) -> Iterator[None]:
    """Turns what storage and parsers say into lines; `damage`: what stands before the latter."""
    try:
        yield
    except InputError:
        raise
    except (OSError, StorageError) as error:
        raise InputError(f"it cannot be read ({_reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{damage} ({error})") from error


def _decoded_manifest(content: bytes) -> Manifest:
    try:
        manifest = Manifest.decode(content)
    except InputError as error:
        raise InputError(f"{files.MANIFEST}: {error}") from error
    for name in (INDEX, files.STATE):
        if name not in manifest.files:
            raise InputError(f"{files.MANIFEST} does not list {name}")
    return manifest


def _check_sizes(storage: CheckpointStorage, name: str, entries: Mapping[str, FileEntry]) -> None:
    for file, entry in entries.items():
        try:
            size = storage.size(name, file)
        except FileNotFoundError as error:
            raise InputError(f"{file} is missing") from error
        if size != entry.size:
            raise InputError(f"{file} has {size:,} bytes, the manifest says {entry.size:,}")


def _read_file(storage: CheckpointStorage, name: str, file: str, manifest: Manifest) -> bytes:
    """A small file, checked."""
    entry = manifest.files[file]
    content = read_whole(storage, name, file, entry.size)
    for index in range(entry.num_blocks):
        block = content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        problem = block_problem(entry, index, block)
        if problem:
            raise InputError(f"{file}: {problem}")
    return content


def _places(index: Index, manifest: Manifest) -> dict[tuple[int, str], tuple[str, int]]:
    """Where the arrays of the rank files begin: their headers follow from the index."""
    if len(index.rows) and int(index.rows[:, 4].max()) >= len(manifest.rank_files):
        raise InputError(f"{INDEX} speaks of files that the manifest does not have")
    places, ends = array_places(index, manifest.rank_files, manifest.keys)
    for name, end in ends.items():
        if end != manifest.files[name].size:
            raise InputError(f"{INDEX} does not fit the size of {name}")
    return places


def array_places(
    index: Index, rank_files: Sequence[str], keys: Sequence[str]
) -> tuple[dict[tuple[int, str], tuple[str, int]], dict[str, int]]:
    """Where each array of each rank file begins, by file number and key; where each file ends."""
    places, ends = {}, {}
    all_sizes = index.array_sizes(len(rank_files), keys)
    for number, (name, sizes) in enumerate(zip(rank_files, all_sizes, strict=True)):
        begin = len(rank_file_header(sizes))
        for key, size in sizes.items():
            places[number, key] = (name, begin)
            begin += 4 * size
        ends[name] = begin
    return places, ends


def candidates(storage: CheckpointStorage) -> Iterator[tuple[str, Checkpoint | InputError]]:
    """What may be checkpoints, newest first: each is opened when it is asked for."""
    for name in storage.names():
        try:
            yield name, open_checkpoint(storage, name)
        except InputError as error:
            yield name, error


def find_checkpoint(path: str | Path) -> Checkpoint:
    """Finds the checkpoint that a path means.

    Args:
        path: a run folder (its newest good checkpoint), or a checkpoint folder; the URL of a
            checkpoint, or of the place of several.

    Raises:
        InputError: there is none, or the named one is damaged.
    """
    if is_remote(path):
        return _at_url(str(path).rstrip("/"))
    path = Path(path)
    if (path / files.CHECKPOINTS).is_dir() or (path / files.CONFIG).is_file():
        return _newest(storage_of(path))
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name a run folder or a checkpoint folder")
    # `latest` and the like are no names, and resolved
    real = path.resolve()
    try:
        return open_checkpoint(LocalStorage(real.parent), real.name)
    except InputError as error:
        text = f"checkpoint {path}: {error}; name another checkpoint of the run"
        raise InputError(text) from error


def _at_url(url: str) -> Checkpoint:
    root, _, name = url.rpartition("/")
    if step_of(name) is None:
        return _newest(storage_at(url))
    try:
        return open_checkpoint(storage_at(root), name)
    except InputError as error:
        text = f"checkpoint {url}: {error}; name another checkpoint of the run"
        raise InputError(text) from error


def _newest(storage: CheckpointStorage) -> Checkpoint:
    damaged: list[str] = []
    for name, found in candidates(storage):
        if isinstance(found, Checkpoint):
            name_passed_over(damaged)
            return found
        damaged.append(f"{storage.where(name)}: {found}")
    why = f" ({'; '.join(damaged)})" if damaged else ""
    where = storage.where()
    raise InputError(f"{where} holds no complete checkpoint{why}; name a run that saved one")


def name_passed_over(damaged: Iterable[str]) -> None:
    """Says in the log which checkpoints are not taken, and why."""
    for each in damaged:
        logger.warning("passed over damaged checkpoint %s", each)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror or error}"
    return str(error)
