"""A forked rank finds what an interpreter of its own would find, and leaves as it would."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support import distributed
from tests.support.distributed import RankFailedError, rank_environment, run_distributed
from tests.support.paths import ROOT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)
FRESH = "import pickle, sys; from tests.support.test_distributed import found; "
FRESH += "sys.stdout.buffer.write(pickle.dumps(found()))"


def found() -> dict[str, Any]:
    """What a process could find changed before anything of a test ran in it."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "group": dist.is_initialized(),
        "signals": [str(signal.getsignal(number)) for number in SIGNALS],
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "environment": {name: os.environ.get(name) for name in ours},
        "folder": os.getcwd(),
        "tasks": len(os.listdir("/proc/self/task")),
    }


def look_around() -> dict[str, Any]:
    """The same of a forked rank, and what is its own."""
    before = found()
    from deepspeed.accelerator import get_accelerator

    return {
        "found": before,
        "accelerator": get_accelerator().device_name(),
        # torch too takes another seed in every process
        "random": (random.random(), float(np.random.random()), float(torch.rand(()))),
        "process": os.getpid(),
        "session": os.getsid(0),
        "hash": hash("a"),
        "imported": "deepspeed" in sys.modules and "tests.support.preloaded" in sys.modules,
        # a lock that another thread held would stay locked for ever in what is forked
        "server tasks": len(os.listdir(f"/proc/{os.getppid()}/task")),
    }


def test_a_forked_rank_finds_what_a_fresh_interpreter_finds() -> None:
    environment = os.environ | rank_environment(0, 2, 1)
    command = [sys.executable, "-c", FRESH]
    fresh = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    first, second = run_distributed(look_around, 2)
    expected = pickle.loads(fresh.stdout)
    assert first["found"] == expected
    expected["environment"] |= {"RANK": "1", "LOCAL_RANK": "1"}
    assert second["found"] == expected
    for rank in (first, second):
        assert rank["imported"] and rank["server tasks"] == 1
        assert rank["accelerator"] == "cpu"
        assert rank["session"] == rank["process"]
    assert not set(first["random"]) & set(second["random"])  # as two interpreters


def test_fresh_ranks_are_interpreters_of_their_own() -> None:
    first, second = run_distributed(look_around, 2, fresh=True)
    assert not first["imported"] and not second["imported"]
    assert first["hash"] != second["hash"]
    assert first["accelerator"] == "cpu"


def test_a_variable_of_the_test_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADLCM_TEST", "one")
    assert run_distributed(os.getenv, 1, "MEGADLCM_TEST") == ["one"]
    monkeypatch.delenv("MEGADLCM_TEST")
    assert run_distributed(os.getenv, 1, "MEGADLCM_TEST") == [None]


def leave_a_mark(path: Path) -> None:
    import atexit

    atexit.register(path.write_text, "left in order")


def test_a_rank_ends_in_order(tmp_path: Path) -> None:
    run_distributed(leave_a_mark, 1, tmp_path / "mark")
    assert (tmp_path / "mark").read_text() == "left in order"


def die(how: signal.Signals) -> None:
    print("about to die", flush=True)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), how)
    time.sleep(60.0)


def test_a_killed_rank_is_reported_and_takes_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "_GRACE_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed, exit code -9:.*about to die"):
        run_distributed(die, 2, signal.SIGKILL)
    assert time.monotonic() - started < 30.0
