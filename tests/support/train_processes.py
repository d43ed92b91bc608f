"""Training as a user starts it: one process for each start, which a test may kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megadlcm.run_folder import files
from megadlcm.run_folder.rows import read_rows, training_rows
from tests.support.checkpoints import load_tensors, newest_folder
from tests.support.tiny_runs import run_values, without_timing

START_SECONDS = 120
_POLL_SECONDS = 1e-3

Moment = Callable[[Path], bool]
"""Whether a run folder shows that the time has come."""


def write_run_file(path: Path, corpus: Path, output_dir: Path, **sections: Any) -> Path:
    """Writes a tiny run as a YAML file; keywords replace entries of sections."""
    path.write_text(yaml.safe_dump(run_values(corpus, output_dir, **sections)), encoding="utf-8")
    return path


def start_command(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Starts `megadlcm WORDS` on one thread, with more variables in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "megadlcm", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for the end of a command that must succeed; returns what it printed."""
    printed, complaints = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, complaints
    return printed


def kill_at(process: subprocess.Popen[str], moment: Moment, run_folder: Path) -> None:
    """Kills a training process in the first moment of a kind that it can be caught in."""
    stop_at(process, moment, run_folder)
    process.kill()
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == -signal.SIGKILL


def stop_at(process: subprocess.Popen[str], moment: Moment, run_folder: Path) -> None:
    """Stops a training process (SIGSTOP) in the first moment of a kind that it is caught in.

    What a poll has seen may be over before a signal arrives: then it goes on and is tried again.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if not moment(run_folder):
            time.sleep(_POLL_SECONDS)
            continue
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if moment(run_folder):
            return
        process.send_signal(signal.SIGCONT)
    process.kill()
    raise AssertionError(f"not caught in time: {process.communicate(timeout=START_SECONDS)}")


def at_start(run_folder: Path) -> bool:
    """The run folder is there, and no step."""
    return (run_folder / "logs").is_dir() and last_step(run_folder) == 0


def after_step(step: int) -> Moment:
    """The row of this step is written."""
    return lambda run_folder: last_step(run_folder) >= step


def while_saving(count: int) -> Moment:
    """A checkpoint is half written while so many, or more, are complete."""

    def saving(run_folder: Path) -> bool:
        names = [name for name in checkpoint_names(run_folder) if name.startswith("step_")]
        unfinished = [name for name in names if name.endswith(".writing")]
        return bool(unfinished) and len(names) - len(unfinished) >= count

    return saving


def last_step(run_folder: Path) -> int:
    """Training steps that have a row in metrics.jsonl; 0 where there is none."""
    return len(training_rows(read_rows(run_folder)))


def checkpoint_names(run_folder: Path) -> list[str]:
    """What lies in the folder of the checkpoints, sorted."""
    root = run_folder / files.CHECKPOINTS
    return sorted(os.listdir(root)) if root.is_dir() else []


def differences(left: Path, right: Path) -> list[str]:
    """Names what two finished runs do not share bit for bit, apart from time and restarts."""
    found = []
    rows = [list(without_timing(read_rows(folder))) for folder in (left, right)]
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[0])} and {len(rows[1])} rows")
    for one, other in zip(*rows, strict=False):
        keys = one.keys() | other.keys()
        changed = sorted(key for key in keys if one.get(key) != other.get(key))
        found += [f"step {one['step']}: {key}" for key in changed]
    (model, optimizer, state), (other_model, other_optimizer, other_state) = (
        load_tensors(newest_folder(folder)) for folder in (left, right)
    )
    found += [f"model {name}" for name in _unequal(model, other_model)]
    found += [f"optimizer {name}" for name in _unequal(optimizer, other_optimizer)]
    counters = [values["train_state"] | {"restart_count": 0} for values in (state, other_state)]
    if counters[0] != counters[1]:
        found.append("counters")
    return found


def _unequal(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    names = sorted(left.keys() | right.keys())
    return [name for name in names if not _same_bits(left.get(name), right.get(name))]


def _same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None or left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(bits[0], bits[1])
