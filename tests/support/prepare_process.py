"""A prepare in a process of its own, which is killed or held at a given moment.

python -m tests.support.prepare_process OPTIONS DISTURBANCE

Both are JSON objects: the PrepareOptions, and a Disturbance. Prints one line of JSON: for
`hold` the numbers of its worker processes, for `kill_at` where it is or how many calls there were.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.prepare import parts
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from tests.support.paths import ROOT

CALLS = ("replace", "fsync", "unlink", "rmdir", "mkdir")
"""Functions of `os` that change what is on the disk for good."""


@dataclass(frozen=True)
class Disturbance:
    """What happens to the process; nothing by itself."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Values by the dotted name of what has them."""
    kill_after: tuple[str, int] | None = None
    """Dotted name of a function, and the call of it after which the process is killed."""
    hold: bool = False
    """Whether it stops for good where the first documents are to be written."""
    kill_at: tuple[int, bool] | None = None
    """Number of the call of CALLS at which it is killed (0: none, but count), and whether that
    call is made before. One that is not leaves half a file where it would have synced one."""


def prepare_command(options: PrepareOptions, disturbance: Disturbance) -> list[str]:
    """The command line of such a process; run it in ROOT."""
    chosen = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    words = (json.dumps(chosen, default=str), json.dumps(asdict(disturbance)))
    return [sys.executable, "-m", "tests.support.prepare_process", *words]


def start_prepare(
    options: PrepareOptions, disturbance: Disturbance, **pipes: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(prepare_command(options, disturbance), text=True, cwd=ROOT, **pipes)


def main(options: dict[str, Any], disturbance: dict[str, Any]) -> None:
    paths = {"tokenizer": Path(options["tokenizer"]), "output": Path(options["output"])}
    chosen = PrepareOptions(**{**options, **paths, "inputs": tuple(options["inputs"])})
    given = Disturbance(**disturbance)
    for name, value in given.settings.items():
        owner, attribute = _owner(name)
        setattr(owner, attribute, value)
    if given.kill_after:
        _kill_after(*given.kill_after)
    if given.hold:
        setattr(parts.PartWriter, "add", _hold)  # noqa: B010
    counter = _Counter(*given.kill_at) if given.kill_at else None
    prepare(chosen)
    if counter:
        print(json.dumps(counter.calls))


def _owner(name: str) -> tuple[Any, str]:
    """The module or class that has a dotted name, and the last word of it."""
    *places, attribute = name.split(".")
    for size in range(len(places), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(places[:size]))
        except ModuleNotFoundError:
            continue
        for place in places[size:]:
            owner = getattr(owner, place)
        return owner, attribute
    raise LookupError(name)


def _kill_after(name: str, call: int) -> None:
    owner, attribute = _owner(name)
    sound, calls = getattr(owner, attribute), []

    def counted(*given: Any) -> Any:
        calls.append(sound(*given))
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return calls[-1]

    setattr(owner, attribute, counted)


def _hold(*_: object) -> None:
    workers = [child.pid for child in multiprocessing.active_children()]
    print(json.dumps(workers), flush=True)
    time.sleep(600)


class _Counter:
    """Counts the calls that change what is on the disk; kills the process at one of them."""

    def __init__(self, kill_at: int, made: bool) -> None:
        self.calls, self._kill_at, self._made = 0, kill_at, made
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, sound: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self._kill_at:
                print(json.dumps(_stage(name, given)), flush=True)
                if self._made:
                    sound(*given, **named)
                elif name == "fsync" and stat.S_ISREG(os.fstat(given[0]).st_mode):
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return sound(*given, **named)

        return call


def _stage(name: str, given: tuple[Any, ...]) -> str:
    """What a prepare is at that makes a call."""
    first = given[0]
    path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
    moves = name == "replace" and "/shard-" in str(given[1])
    if name in ("unlink", "rmdir") and "/.unfinished" in path:
        return "clearing"
    for place, what in {
        "digests": "digests",
        "/duplicates": "duplicates",
        "/ready": "the decision",
        "/parts": "shards",
    }.items():
        if place in path and not moves:
            return what
    return "moves" if name == "replace" or "/shard-" in path else "the rest"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
