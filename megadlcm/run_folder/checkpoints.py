"""Checkpoint folders that are complete or not there: commit, verify, find, prune. Files only.

    checkpoints/step_0000000100/    model.safetensors, optimizer.safetensors, state.json,
                                    manifest.json
    checkpoints/latest              name of the newest folder, for people; resuming ignores it

A folder is written as `step_0000000100.tmp`; every file is fsynced, `manifest.json` (size and
SHA-256 of each file) is written last, then the folder gets its name and its parent is fsynced.
Whatever is killed, whenever: a folder whose manifest fits is complete, every other is passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, StorageError
from data_pipeline.output_folder import reading, sync_path, write_durably, writing
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(files.STEP_PATTERN)
_UNFINISHED = re.compile(files.STEP_PATTERN + r"\.(tmp|old)")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and whether it can be trusted."""

    path: Path
    """The folder."""
    step: int
    """Completed optimizer steps."""
    problem: str
    """What is wrong with it; empty for a complete, verified checkpoint."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def commit(
    root: Path,
    step: int,
    writers: Mapping[str, Callable[[Path], None]],
    num_bytes: int | None = None,
) -> Path:
    """Writes a checkpoint folder so that it is complete as soon as it has its name.

    Args:
        root: the folder `checkpoints`.
        step: completed optimizer steps.
        writers: for each file name, a function that writes the file at the path it is given.
        num_bytes: about how many bytes they write, where that is known.

    Returns:
        The committed folder.

    Raises:
        StorageError: the disk does not take it; what was written of it is removed.
    """
    final = root / files.step_name(step)
    building = final.with_name(final.name + ".tmp")
    with writing(final, num_bytes):
        try:
            _build(building, step, writers)
        except (OSError, StorageError):
            shutil.rmtree(building, ignore_errors=True)  # the room may be needed, and is counted
            raise
        _publish(building, final)
        write_durably(root / files.LATEST, f"{final.name}\n".encode())
    return final


def _build(building: Path, step: int, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Writes the files of a checkpoint and their manifest into a folder of its own."""
    building.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    entries = {}
    for name, write in writers.items():
        path = building / name
        write(path)
        # before the manifest claims it: a crash of the machine must not leave holes behind digests
        sync_path(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = json.dumps({"step": step, "files": entries}, indent=1)
    write_durably(building / files.MANIFEST, manifest.encode())


def _publish(building: Path, final: Path) -> None:
    """Gives a whole checkpoint folder its name."""
    root = final.parent
    if final.exists():  # an earlier attempt that was passed over; its name is needed now
        # a folder cannot be replaced in one call where the target has files: two renames, and what
        # is left between them is recognised by its name
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
        building.replace(final)
        sync_path(root)
        shutil.rmtree(old)
    else:
        building.replace(final)
        sync_path(root)


def find_problem(folder: Path) -> str:
    """Says what is wrong with a checkpoint folder; empty if every file is as the manifest says.

    Raises:
        StorageError: the disk fails, which does not make it a damaged one.
    """
    with reading(folder):
        return _problem(folder)


def _problem(folder: Path) -> str:
    # the manifest is written last: without it nothing else in the folder says anything
    manifest_path = folder / files.MANIFEST
    if not manifest_path.is_file():
        return f"{files.MANIFEST} is missing (the checkpoint was never committed)"
    try:
        with reading(manifest_path):
            text = manifest_path.read_text(encoding="utf-8")
        entries = json.loads(text)["files"]
        expected = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        return f"{files.MANIFEST} cannot be read ({error})"
    for name, (num_bytes, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        # sizes first: they cost nothing, and most torn files are short
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {num_bytes}"
        if sha256_of(path) != sha256:
            return f"{name} has another SHA-256 than the manifest says"
    return ""


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """Lists the checkpoint folders of a run, newest first, without reading them."""
    if not root.is_dir():
        return []
    found = []
    with reading(root):
        paths = list(root.iterdir())
    for path in paths:
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def verify_all(root: Path) -> list[Checkpoint]:
    """Verifies every checkpoint folder of a run, newest first."""
    return [Checkpoint(path, step, find_problem(path)) for step, path in list_steps(root)]


def newest_verified(root: Path) -> Checkpoint | None:
    """Finds the newest complete, verified checkpoint; damaged ones are named in the log.

    Args:
        root: the folder `checkpoints`.

    Returns:
        The checkpoint, or None if there is none.
    """
    passed_over: list[str] = []
    found = _first_good(root, passed_over)
    _name(passed_over)
    return found


def _first_good(root: Path, passed_over: list[str]) -> Checkpoint | None:
    """The newest good checkpoint; what is newer and damaged is put on the list."""
    # newest first, and no further than needed: each look reads a whole checkpoint
    for step, path in list_steps(root):
        problem = find_problem(path)
        if not problem:
            return Checkpoint(path, step, "")
        passed_over.append(f"{path}: {problem}")
    return None


def _name(passed_over: list[str]) -> None:
    for each in passed_over:
        logger.warning("passed over damaged checkpoint %s", each)


def remove_unfinished(root: Path) -> None:
    """Removes what a killed save left behind."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            logger.warning("removed unfinished checkpoint %s", path)
            with writing(path):
                shutil.rmtree(path)


def prune(root: Path, keep: int, newest_good: Path) -> None:
    """Removes all but the newest checkpoints.

    Args:
        root: the folder `checkpoints`.
        keep: how many stay; 0 keeps all.
        newest_good: a checkpoint known to be complete, which stays whatever its age. Folders newer
            than it do not count as kept: they may be damaged.
    """
    if keep == 0:
        return
    # folders newer than the good one may be damaged and must not push it out of those that stay
    older = [(step, path) for step, path in list_steps(root) if path.name <= newest_good.name]
    for _, path in older[keep:]:
        if path == newest_good:
            continue
        doomed = path.with_name(path.name + ".old")
        with writing(path):
            shutil.rmtree(doomed, ignore_errors=True)
            path.replace(doomed)  # a removal that is killed half-way must not look like damage
            shutil.rmtree(doomed)


def read_description(path: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint folder."""
    with reading(path / files.STATE):
        text = (path / files.STATE).read_text(encoding="utf-8")
    description: dict[str, Any] = json.loads(text)
    return description


def find_checkpoint(path: str | Path) -> Path:
    """Finds the checkpoint that a path means.

    Args:
        path: a run folder (its newest complete checkpoint), or a checkpoint folder.

    Returns:
        A complete, verified checkpoint folder.

    Raises:
        InputError: there is none, or the named one is damaged.
    """
    path = Path(path)
    if (path / files.CHECKPOINTS).is_dir():
        return _newest_good(path / files.CHECKPOINTS)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; name a run folder or a checkpoint folder")
    problem = find_problem(path)
    if problem:
        raise InputError(f"checkpoint {path}: {problem}; name another checkpoint of the run")
    return path


def _newest_good(root: Path) -> Path:
    damaged: list[str] = []
    found = _first_good(root, damaged)
    if found is not None:
        _name(damaged)
        return found.path
    why = f" ({'; '.join(damaged)})" if damaged else ""
    raise InputError(f"{root} holds no complete checkpoint{why}; name a run that saved one")
