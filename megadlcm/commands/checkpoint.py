"""`megadlcm checkpoint list|verify|inspect RUN_DIR`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from data_pipeline.commands.arguments import add_command
from data_pipeline.errors import InputError
from megadlcm.run_folder import files


def add_parser(commands: Any) -> None:
    """Adds `checkpoint` and its commands; see `add_command`."""
    summary = "list, verify and inspect the checkpoints of a run"
    example = "example: megadlcm checkpoint verify runs/quickstart/run"
    parser = add_command(commands, "checkpoint", summary, example)
    commands = parser.add_subparsers(dest="checkpoint_command", metavar="COMMAND", required=True)
    run_folder = "output_dir of a run"
    # one argument each so far: a table of them; the first with options gets a function of its own
    for name, run, folder, description in (
        (
            "list",
            run_list,
            run_folder,
            "list the checkpoints of a run, newest first, without reading them",
        ),
        (
            "verify",
            run_verify,
            run_folder,
            "check sizes and SHA-256 of every file; exit 2 if one is damaged",
        ),
        (
            "inspect",
            run_inspect,
            f"{run_folder} (its newest good checkpoint), or a checkpoint folder",
            "show counters, layout, versions and tensors of a checkpoint",
        ),
    ):
        example = f"example: megadlcm checkpoint {name} runs/quickstart/run"
        command = add_command(commands, name, description, example)
        command.add_argument("run_dir", metavar="RUN_DIR", help=folder)
        command.set_defaults(run=run)


def _root(run_dir: str) -> Path:
    root = Path(run_dir) / files.CHECKPOINTS
    if not root.is_dir():
        raise InputError(
            f"{run_dir} has no folder {files.CHECKPOINTS!r}; name the output_dir of a run"
        )
    return root


def run_list(arguments: argparse.Namespace) -> int:
    """Prints step, size and name of every checkpoint; 0."""
    from data_pipeline.tables import render_table
    from megadlcm.run_folder import checkpoints

    root = _root(arguments.run_dir)
    # for people only: resuming looks at the folders themselves
    latest_file = root / files.LATEST
    latest = latest_file.read_text(encoding="utf-8").strip() if latest_file.is_file() else ""
    found = checkpoints.list_steps(root)
    if not found:
        print(f"{root} holds no checkpoint yet")
    rows = [
        (f"{step}", f"{_folder_bytes(path) / 1e6:.1f} MB", f"{path}{_mark(path, latest)}")
        for step, path in found
    ]
    if rows:
        print(render_table(("step", "size", "folder"), rows, left=(2,)))
    return 0


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _mark(path: Path, latest: str) -> str:
    return "  (latest)" if path.name == latest else ""


def run_verify(arguments: argparse.Namespace) -> int:
    """Prints the state of every checkpoint of a run; 0, or InputError where one is damaged."""
    from data_pipeline.tables import render_table
    from megadlcm.run_folder import checkpoints

    root = _root(arguments.run_dir)
    found = checkpoints.verify_all(root)
    if not found:
        raise InputError(f"{root} holds no checkpoint; name the output_dir of a run that saved one")
    rows = [
        ("DAMAGED" if checkpoint.problem else "ok", str(checkpoint.path), checkpoint.problem)
        for checkpoint in found
    ]
    print(render_table((), rows, left=(0, 1, 2)))
    num_damaged = sum(bool(checkpoint.problem) for checkpoint in found)
    # after the table: whoever reads it wants to see the others too
    if num_damaged:
        raise InputError(
            f"{root}: {num_damaged} of {len(found)} checkpoints damaged; a run passes over "
            "them, remove or restore them"
        )
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Prints what the newest good checkpoint, or the named one, contains; 0."""
    from safetensors import safe_open

    from data_pipeline.tables import render_table
    from megadlcm.run_folder import checkpoints

    path = checkpoints.find_checkpoint(arguments.run_dir)
    description = checkpoints.read_description(path)
    print(path)
    for section in ("train_state", "layout", "versions"):
        print(f"{section}: {_inline(description[section])}")
    with safe_open(path / files.MODEL, framework="np") as tensors:
        slices = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
        shapes = {name: part.get_shape() for name, part in slices.items()}
        rows = [(name, part.get_dtype(), str(shapes[name])) for name, part in slices.items()]
    print(render_table(("tensor", "type", "shape"), rows, left=(0, 1, 2)))
    print(f"{len(rows)} tensors, {sum(map(math.prod, shapes.values())):,} values")
    return 0


def _inline(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
