"""`megadlcm checkpoint list|verify|inspect|diff|convert|pin|unpin`."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.arguments import add_command, integer
from data_pipeline.errors import InputError, StorageError
from megadlcm.run_folder import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from megadlcm.checkpoint.storage import CheckpointStorage

_RUN = "runs/quickstart/run"
_RUN_FOLDER = "output_dir of a run"
_CHECKPOINT = f"{_RUN_FOLDER} (its newest good checkpoint), or a checkpoint folder"
_VERIFY_THREADS = 4

_CONVERT_EXAMPLE = f"""\
examples:
  megadlcm checkpoint convert {_RUN} shared/step_0000000300 --files 8
  megadlcm checkpoint convert {_RUN} whole --consolidated --optimizer

The new folder is a checkpoint: it can be verified, loaded and converted again. In the folder
{files.CHECKPOINTS} of a run, under the name of its step, a run goes on from it."""


def add_parser(commands: Any) -> None:
    """Adds `checkpoint` and its commands; see `add_command`."""
    summary = "list, verify, inspect, compare, convert and pin the checkpoints of a run"
    example = f"example: megadlcm checkpoint verify {_RUN}"
    parser = add_command(commands, "checkpoint", summary, example)
    commands = parser.add_subparsers(dest="checkpoint_command", metavar="COMMAND", required=True)

    def add(name: str, run: Any, description: str, words: str = "", example: str = "") -> Any:
        example = example or f"example: megadlcm checkpoint {name} {words or _RUN}"
        command = add_command(commands, name, description, example)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        return command

    command = add("list", run_list, "list the checkpoints of a run, newest first, by manifests")
    command.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_FOLDER)
    command = add("verify", run_verify, "check every block of every file; exit 2 if one is damaged")
    command.add_argument(
        "run_dir", metavar="RUN_DIR", help=f"{_RUN_FOLDER}, or a checkpoint folder"
    )
    command.add_argument(
        "--quick", action="store_true", help="manifests, and names and sizes of files, alone"
    )
    command = add("inspect", run_inspect, "show counters, layout, versions and tensors")
    command.add_argument("run_dir", metavar="RUN_DIR", help=_CHECKPOINT)
    steps = f"{_RUN}/checkpoints/step_0000000100 {_RUN}"
    command = add(
        "diff", run_diff, "show what two checkpoints do not share, by fingerprints", steps
    )
    command.add_argument("first", metavar="A", help=_CHECKPOINT)
    command.add_argument("second", metavar="B", help="the same")
    _add_convert(add)
    for name, run, what in (
        ("pin", run_pin, "keep checkpoints whatever checkpoint.keep says"),
        ("unpin", run_unpin, "let pinned checkpoints go with their age"),
    ):
        command = add(name, run, what, f"{_RUN} 100 200")
        command.add_argument("run_dir", metavar="RUN_DIR", help=_RUN_FOLDER)
        command.add_argument("steps", metavar="STEP", nargs="+", help="a step, or a folder's name")


def _add_convert(add: Callable[..., Any]) -> None:
    command = add(
        "convert",
        run_convert,
        "write a checkpoint anew, over other files or as whole tensors",
        example=_CONVERT_EXAMPLE,
    )
    command.add_argument("source", metavar="SRC", help=_CHECKPOINT)
    command.add_argument("target", metavar="DST", type=Path, help="the new checkpoint folder")
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--files", type=integer(1), metavar="N", help="share it out over N files (default: 1)"
    )
    way.add_argument(
        "--consolidated",
        action="store_true",
        help=f"write {files.MODEL}: fp32 parameters and buffers, by name",
    )
    command.add_argument(
        "--optimizer",
        action="store_true",
        help=f"with --consolidated: {files.OPTIMIZER}, too",
    )


def run_list(arguments: argparse.Namespace) -> int:
    """Prints what a run has saved, newest first; 0."""
    from megadlcm.checkpoint.listing import list_checkpoints
    from megadlcm.commands.checkpoint_tables import list_to_dicts, render_list

    storage = _storage_of(arguments.run_dir)
    with _listing(storage):
        found = list(list_checkpoints(storage))
    if arguments.json:
        _print_json({"run_dir": arguments.run_dir, "checkpoints": list_to_dicts(found, storage)})
    elif found:
        print(render_list(found, storage))
    else:
        print(f"{storage.where()} holds no checkpoint yet")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Prints the state of every checkpoint of a run; 0, or InputError where one is damaged."""
    from megadlcm.checkpoint.verifying import verify
    from megadlcm.commands.checkpoint_tables import render_verdicts, verdict_to_dict

    storage, names = _named(arguments.run_dir)
    if not names:
        raise InputError(
            f"{storage.where()} holds no checkpoint; name the output_dir of a run that saved one"
        )
    total = _total_bytes(storage, names)
    with _showing("verify", total) as watch:
        verdicts = [
            verify(storage, name, quick=arguments.quick, threads=_VERIFY_THREADS, watch=watch)
            for name in names
        ]
    if arguments.json:
        values = [verdict_to_dict(each, storage) for each in verdicts]
        _print_json({"run_dir": arguments.run_dir, "checkpoints": values})
    else:
        print(render_verdicts(verdicts, storage))
    num_damaged = sum(bool(verdict.problem) for verdict in verdicts)
    # after the table: whoever reads it wants to see the others too
    if num_damaged:
        raise InputError(
            f"{storage.where()}: {num_damaged} of {len(verdicts)} checkpoints damaged; a run "
            "passes over them, remove or restore them"
        )
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Prints what the newest good checkpoint, or the named one, contains; 0."""
    from megadlcm.checkpoint.folder import find_checkpoint
    from megadlcm.commands.checkpoint_tables import contents_to_dict, render_contents

    checkpoint = find_checkpoint(arguments.run_dir)
    values = contents_to_dict(checkpoint)
    if arguments.json:
        _print_json(values)
    else:
        print(render_contents(values))
    return 0


def run_diff(arguments: argparse.Namespace) -> int:
    """Prints what two checkpoints do not share; 0 also where they differ."""
    from megadlcm.checkpoint.comparing import compare
    from megadlcm.checkpoint.folder import find_checkpoint
    from megadlcm.commands.checkpoint_tables import difference_to_dict, render_difference

    difference = compare(find_checkpoint(arguments.first), find_checkpoint(arguments.second))
    if arguments.json:
        _print_json(difference_to_dict(difference))
    else:
        print(render_difference(difference))
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Writes a checkpoint anew; 0."""
    from megadlcm.checkpoint.converting import (
        check_target,
        convert_to_files,
        convert_to_whole_tensors,
    )
    from megadlcm.checkpoint.folder import find_checkpoint, quick_look
    from megadlcm.checkpoint.storage import LocalStorage

    if arguments.optimizer and not arguments.consolidated:
        raise InputError(
            "--optimizer goes with --consolidated; --files has the optimizer's state in any case",
            key="--optimizer",
        )
    source, target = find_checkpoint(arguments.source), arguments.target.absolute()
    check_target(source, target)
    with_states = arguments.optimizer or not arguments.consolidated
    kinds = 1 + len(source.manifest.keys) if with_states else 1
    with _showing("convert", 4 * kinds * source.manifest.num_elements) as watch:
        if arguments.consolidated:
            convert_to_whole_tensors(source, target, arguments.optimizer, watch)
        else:
            convert_to_files(source, target, arguments.files or 1, watch)
    manifest = quick_look(LocalStorage(target.parent), target.name)
    if arguments.json:
        sizes = {name: entry.size for name, entry in manifest.files.items()}
        _print_json({"path": str(target), "step": manifest.step, "files": sizes})
    else:
        megabytes = manifest.num_bytes / 1e6
        print(f"{target}: step {manifest.step}, {len(manifest.files)} files, {megabytes:.1f} MB")
    return 0


def run_pin(arguments: argparse.Namespace) -> int:
    """Pins checkpoints; 0."""
    storage = _storage_of(arguments.run_dir)
    with _listing(storage):
        there = storage.names()
    names = _names_of(arguments.steps)
    absent = [name for name in names if name not in there]
    if absent:
        raise InputError(
            f"{storage.where()} holds no {absent[0]}; see megadlcm checkpoint list "
            f"{arguments.run_dir}"
        )
    return _change_pins(arguments, storage, _pins_of(storage) | set(names))


def run_unpin(arguments: argparse.Namespace) -> int:
    """Takes pins away; 0."""
    storage = _storage_of(arguments.run_dir)
    pins, names = _pins_of(storage), _names_of(arguments.steps)
    absent = [name for name in names if name not in pins]
    if absent:
        pinned = ", ".join(sorted(pins)) or "none"
        raise InputError(f"{storage.where()}: {absent[0]} is not pinned (pinned: {pinned})")
    return _change_pins(arguments, storage, pins - set(names))


def _change_pins(arguments: argparse.Namespace, storage: CheckpointStorage, pins: set[str]) -> int:
    storage.set_pins(pins)
    if arguments.json:
        _print_json({"run_dir": arguments.run_dir, "pinned": sorted(pins)})
    else:
        print(f"pinned: {', '.join(sorted(pins)) or 'none'}")
    return 0


def _pins_of(storage: CheckpointStorage) -> set[str]:
    from megadlcm.checkpoint.storage import PINS

    try:
        return storage.pins()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{storage.where(PINS)} cannot be read ({error}); mend or remove it"
        ) from error


def _names_of(steps: list[str]) -> list[str]:
    from megadlcm.checkpoint.folder import step_of

    names = [files.step_name(int(step)) if step.isdecimal() else step for step in steps]
    for step, name in zip(steps, names, strict=True):
        if step_of(name) is None:
            raise InputError(f"STEP {step}: must be a step such as 100, or {files.step_name(100)}")
    return names


def _storage_of(run_dir: str) -> CheckpointStorage:
    from megadlcm.checkpoint.folder import storage_of
    from megadlcm.checkpoint.storage import LocalStorage

    storage = storage_of(run_dir)
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise InputError(
            f"{run_dir} has no folder {storage.root.name!r}; name the output_dir of a run"
            if storage.root.parent == Path(run_dir)
            else f"{run_dir}: checkpoint.folder = {storage.where()} is no folder; is it mounted?"
        )
    return storage


def _named(path: str) -> tuple[CheckpointStorage, list[str]]:
    """What a path names: all checkpoints of a run, or one."""
    from megadlcm.checkpoint.storage import LocalStorage

    if not (Path(path) / files.CHECKPOINTS).is_dir() and (Path(path) / files.MANIFEST).is_file():
        real = Path(path).resolve()
        return LocalStorage(real.parent), [real.name]
    storage = _storage_of(path)
    with _listing(storage):
        return storage, storage.names()


@contextmanager
def _listing(storage: CheckpointStorage) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{storage.where()} cannot be listed ({reason})") from error


def _total_bytes(storage: CheckpointStorage, names: list[str]) -> int:
    from megadlcm.checkpoint.folder import quick_look

    total = 0
    for name in names:
        try:
            total += quick_look(storage, name).num_bytes
        except (InputError, StorageError):
            continue
    return total


@contextmanager
def _showing(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress by bytes; what it yields may be called by several threads."""
    from data_pipeline.progress import Progress

    done, lock = 0, threading.Lock()

    def watch(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress.update(min(done, total), done // 10**6)

    with Progress(title, total, "MB") as progress:
        yield watch


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))
