"""Checkpoints as people and scripts read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from data_pipeline.tables import render_table
from megadlcm.checkpoint.comparing import Difference
from megadlcm.checkpoint.folder import Checkpoint
from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.listing import Listed
from megadlcm.checkpoint.storage import CheckpointStorage
from megadlcm.checkpoint.verifying import Verdict

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def list_to_dicts(found: Sequence[Listed], storage: CheckpointStorage) -> list[dict[str, Any]]:
    """Checkpoints of a run."""
    values = []
    for each in found:
        manifest = each.manifest
        values.append(
            {
                "step": each.step,
                "name": each.name,
                "path": storage.where(each.name),
                "bytes": manifest.num_bytes if manifest else None,
                "files": len(manifest.files) if manifest else None,
                "layout": manifest.layout if manifest else None,
                "written": (manifest.written if manifest else "") or None,
                "age_seconds": _age(manifest.written) if manifest else None,
                "status": "damaged" if each.problem else "complete",
                "problem": each.problem,
                "pinned": each.is_pinned,
                "newest": each.is_newest,
            }
        )
    return values


def render_list(found: Sequence[Listed], storage: CheckpointStorage) -> str:
    """The table of `list`."""
    rows = []
    for each, values in zip(found, list_to_dicts(found, storage), strict=True):
        marks = [f"damaged: {each.problem}" if each.problem else "complete"]
        marks += ["newest"] * each.is_newest + ["pinned"] * each.is_pinned
        size = values["bytes"]
        rows.append(
            (
                str(each.step),
                "-" if size is None else f"{size / 1e6:.1f} MB",
                str(values["files"] or "-"),
                _layout_text(values["layout"] or {}),
                _age_text(values["age_seconds"]),
                ", ".join(marks),
            )
        )
    header = ("step", "size", "files", "layout", "age", "status")
    return render_table(header, rows, left=(3, 5))


def _layout_text(layout: dict[str, int]) -> str:
    try:
        world, tensor, pipeline, stage = (
            layout[f"{key}"]
            for key in (
                "world_size",
                "tensor_parallel_size",
                "pipeline_parallel_size",
                "zero_stage",
            )
        )
        return f"tp{tensor} pp{pipeline} dp{world // (tensor * pipeline)} zero{stage}"
    except (KeyError, TypeError, ZeroDivisionError):
        return "-"


def _age(written: str) -> float | None:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(written)).total_seconds()
    except (ValueError, TypeError):
        return None


def _age_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    # clocks of nodes differ
    name, length = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    return f"{max(int(seconds // length), 0)} {name}"


def verdict_to_dict(verdict: Verdict, storage: CheckpointStorage) -> dict[str, Any]:
    """What `verify` says of one checkpoint."""
    return {
        "name": verdict.name,
        "path": storage.where(verdict.name),
        "status": _status(verdict),
        "problem": verdict.problem,
        "bytes": verdict.num_bytes,
    }


def render_verdicts(verdicts: Sequence[Verdict], storage: CheckpointStorage) -> str:
    """The table of `verify`."""
    marks = {"damaged": "DAMAGED"}
    rows = [
        (
            marks.get(_status(each), _status(each)),
            storage.where(each.name),
            "removed meanwhile" if each.is_gone else each.problem,
        )
        for each in verdicts
    ]
    return render_table((), rows, left=(0, 1, 2))


def _status(verdict: Verdict) -> str:
    if verdict.is_gone:
        return "gone"
    return "damaged" if verdict.problem else "ok"


def contents_to_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is in a checkpoint."""
    manifest, index = checkpoint.manifest, checkpoint.index
    counts = np.bincount(index.rows[:, 0], minlength=len(index.names))
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(shape),
            "elements": math.prod(shape),
            "slices": int(count),
            "kind": "parameter" if number < index.num_parameters else "buffer",
        }
        for number, ((name, shape), count) in enumerate(
            zip(index.shapes.items(), counts, strict=True)
        )
    ]
    elements = sum(tensor["elements"] for tensor in tensors)
    own = sum(tensor["elements"] for tensor in tensors[: index.num_parameters])
    sizes = {MASTER: 4 * elements} | dict.fromkeys(manifest.keys, 4 * own)
    sizes["other"] = manifest.num_bytes - sum(sizes.values())
    return {
        "path": checkpoint.storage.where(checkpoint.name),
        "step": checkpoint.step,
        "format": manifest.format,
        "written": manifest.written or None,
        "files": len(manifest.files),
        "train_state": checkpoint.description["train_state"],
        "layout": checkpoint.description.get("layout", {}),
        "versions": checkpoint.description.get("versions", {}),
        "bytes": sizes,
        "tensors": tensors,
    }


def render_contents(values: dict[str, Any]) -> str:
    """The text of `inspect`."""
    written = f", written {values['written']}" if values["written"] else ""
    lines = [
        values["path"],
        f"step {values['step']}: {values['files']} files of format {values['format']}{written}",
    ]
    lines += [f"{key}: {_inline(values[key])}" for key in ("train_state", "layout", "versions")]
    sizes = {key: f"{size:,}" for key, size in values["bytes"].items()}
    lines.append(f"bytes: {_inline(sizes)}")
    rows = [
        (each["name"], str(each["shape"]), f"{each['elements']:,}", str(each["slices"]))
        for each in values["tensors"]
    ]
    lines.append(render_table(("tensor", "shape", "elements", "slices"), rows, left=(0, 1)))
    elements = sum(each["elements"] for each in values["tensors"])
    lines.append(f"{len(rows)} tensors, {elements:,} values")
    return "\n".join(lines)


def _inline(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def difference_to_dict(difference: Difference) -> dict[str, Any]:
    """What two checkpoints do not share."""
    return {
        "steps": list(difference.steps),
        "equal": difference.is_equal,
        "unknown": difference.unknown,
        "num_equal": difference.num_equal,
        "tensors": [
            {"name": each.name, "kinds": each.kinds, "reason": each.reason}
            for each in difference.tensors
        ],
        "counters": {key: list(pair) for key, pair in difference.counters.items()},
    }


def render_difference(difference: Difference) -> str:
    """The text of `diff`."""
    rows = [(each.name, each.reason or ", ".join(each.kinds)) for each in difference.tensors]
    lines = [render_table(("tensor", "differs in"), rows, left=(0, 1))] if rows else []
    lines += [f"{key}: {one} and {other}" for key, (one, other) in difference.counters.items()]
    if difference.unknown:
        lines.append(difference.unknown)
    else:
        lines.append(f"{difference.num_equal} tensors are bit-equal, {len(rows)} differ")
    return "\n".join(lines)
