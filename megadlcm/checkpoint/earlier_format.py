"""Checkpoints of the first format: whole tensors, written by one process.

    model.safetensors       fp32 masters and saved buffers, by name
    optimizer.safetensors   `<parameter>.<kind of state>`
    state.json, manifest.json (size and SHA-256 of each file)

They are read as ones of a slice for each tensor.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import InputError
from megadlcm.checkpoint.format import MASTER, FileEntry, Manifest, parse_header
from megadlcm.checkpoint.index import Index, Range, Shape
from megadlcm.checkpoint.storage import CheckpointStorage, read_blocks, read_whole
from megadlcm.run_folder import files

_STEP = "step"
_Head = dict[str, tuple[int, Shape]]


@dataclass(frozen=True)
class WholeTensors:
    """What is in such a checkpoint."""

    manifest: Manifest
    index: Index
    places: dict[tuple[int, str], tuple[str, int]]
    """Where the array of a file number and key begins: file name and byte."""
    optimizer_step: int | None


def files_of(content: bytes) -> dict[str, Any] | None:
    """The manifest of such a checkpoint; None for that of another one."""
    try:
        values = json.loads(content)
        is_first = "format" not in values and {files.MODEL, files.STATE} <= set(values["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return values if is_first else None


def outline(manifest: dict[str, Any]) -> Manifest:
    """What such a manifest says, with nothing of the files but their sizes.

    Raises:
        InputError: it is damaged.
    """
    try:
        entries = {
            file: FileEntry(int(said["bytes"]), "", "") for file, said in manifest["files"].items()
        }
        return Manifest(
            step=int(manifest["step"]),
            run="",
            attempt="",
            written=str(manifest.get("written", "")),
            layout={},
            keys=[],
            num_elements=0,
            rank_files=[],
            files=entries,
            fingerprints=dict(manifest.get("fingerprints", {})),
            format=1,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{files.MANIFEST} is damaged ({error})") from error


def read(storage: CheckpointStorage, name: str, manifest: dict[str, Any]) -> WholeTensors:
    """Opens such a checkpoint; its files are read once, and verified.

    Raises:
        InputError: it is damaged; the line says how.
        OSError: the storage fails.
    """
    said = outline(manifest)
    entries: dict[str, FileEntry] = {}
    heads: dict[str, _Head] = {}
    for file, entry in said.files.items():
        sha256 = str(manifest["files"][file].get("sha256"))
        entries[file] = _verified(storage, name, file, entry.size, sha256)
        if file.endswith(".safetensors"):
            heads[file] = _head(storage, name, file, entry.size)
    return _contents(storage, name, replace(said, files=entries), heads)


def _verified(
    storage: CheckpointStorage, name: str, file: str, size: int, sha256: str
) -> FileEntry:
    digest, blocks = hashlib.sha256(), []
    for block in read_blocks(storage, name, file, size):
        digest.update(block)
        blocks.append(FileEntry.checksum(block))
    if digest.hexdigest() != sha256:
        raise InputError(f"{file} has another SHA-256 than the manifest says")
    return FileEntry.of(size, blocks)


def _head(storage: CheckpointStorage, name: str, file: str, size: int) -> _Head:
    length = int.from_bytes(read_whole(storage, name, file, 8), "little")
    content = read_whole(storage, name, file, min(8 + length, size))
    try:
        return parse_header(content, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no file of fp32 tensors ({error})") from error


def _contents(
    storage: CheckpointStorage,
    name: str,
    manifest: Manifest,
    heads: dict[str, _Head],
) -> WholeTensors:
    model, optimizer = heads[files.MODEL], heads.get(files.OPTIMIZER, {})
    states = [each.rpartition(".") for each in optimizer]
    owners = {owner for owner, _, _ in states}
    keys = sorted({key for _, _, key in states} - {_STEP})
    missing = [
        f"{owner}.{key}" for owner in owners for key in keys if f"{owner}.{key}" not in optimizer
    ]
    if missing or not owners <= set(model):
        raise InputError(f"{files.OPTIMIZER} does not fit {files.MODEL}")
    # parameters first; where there is no optimizer state nothing tells them from buffers
    names = sorted(model, key=lambda each: (bool(owners) and each not in owners, each))
    shapes = {each: model[each][1] for each in names}
    slices = []
    places: dict[tuple[int, str], tuple[str, int]] = {}
    for number, (each, shape) in enumerate(shapes.items()):
        slices.append([Range.whole(each, shape)])
        places[number, MASTER] = (files.MODEL, model[each][0])
        for key in keys if each in owners else ():
            places[number, key] = (files.OPTIMIZER, optimizer[f"{each}.{key}"][0])
    index = Index.of(shapes, len(owners) or len(names), slices)
    num_elements = sum(len(part) for (part,) in slices)
    fingerprints = manifest.fingerprints  # only a converted one has them
    if set(fingerprints) != set(names) or {len(s) for s in fingerprints.values()} != {
        1 + len(keys)
    }:
        fingerprints = {}
    manifest = replace(manifest, keys=keys, num_elements=num_elements, fingerprints=fingerprints)
    return WholeTensors(manifest, index, places, _count(storage, name, optimizer))


def _count(storage: CheckpointStorage, name: str, optimizer: _Head) -> int | None:
    """Steps that the optimizer counted."""
    counts = [place for each, (place, _) in optimizer.items() if each.endswith(f".{_STEP}")]
    if not counts:
        return None
    content = bytearray(4)
    storage.read(name, files.OPTIMIZER, counts[0], memoryview(content))
    return int(struct.unpack("<f", content)[0])
