"""Runs a function on several gloo processes, which meet the way those of torchrun meet.

The processes are forked by a server that has imported torch, DeepSpeed and the trainer once: the
imports took three seconds of a core for each process. What a fork could hide is kept away from it
and checked in `test_distributed`: the server has a single thread and knows of no process group, and
each process draws seeds of its own. Two things differ: forked processes share the seed of Python's
hashes, so that an order that comes from a set is the same on all of them, and C libraries do not
read the environment again. Where that matters, and in a test of every kind of layout, ranks are
fresh interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.support.paths import ROOT

TIMEOUT_SECONDS = 300
_GRACE_SECONDS = 5.0
"""How long the others may go on after one process failed: most of them then fail by themselves."""
_POLL_SECONDS = 0.02
FAILED = ".failed"
ON_THIS_MACHINE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""What libraries read while they are imported; the same for every process."""
PRELOADED = ("tests.support.preloaded",)


class RankFailedError(AssertionError):
    """A process failed; the message is its traceback."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
    fresh: bool = False,
) -> list[Any]:
    """Calls a function on each rank of a run and returns what the ranks returned, in rank order.

    Args:
        function: a function at the top of a module.
        world_size: how many processes.
        arguments: picklable.
        timeout_seconds: when the processes are killed.
        fresh: whether each rank is an interpreter of its own, which takes seconds.

    Raises:
        RankFailedError: a process failed, or the time is over.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        port = free_port()
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                environment = os.environ | rank_environment(rank, world_size, port)
                start = _start_interpreter if fresh else fork
                processes.append(start(_run_rank, folder, rank, dict(environment)))
            _wait(processes, time.monotonic() + timeout_seconds)
            ended = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
        if any(ended):
            raise RankFailedError(_first_failure(folder, ended))
        if None in ended:
            logs = sorted(folder.glob("*.log"))
            texts = [f"{log.name}:\n{log.read_text()}" for log in logs]
            raise RankFailedError("\n".join(["timed out", *texts]))
        return [pickle.loads(_path(folder, rank).read_bytes()) for rank in range(world_size)]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells one process of a run on this machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    } | ON_THIS_MACHINE


def fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process forked by the server of this session, which is started when it is first needed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # the server does not get the search path of this process, and would import nothing elsewhere
    with mock.patch.dict(os.environ, ON_THIS_MACHINE | {"PYTHONPATH": str(ROOT)}):
        ensure_running()
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def _start_interpreter(
    function: Callable[..., None], folder: Path, rank: int, environment: dict[str, str]
) -> BaseProcess:
    """The same on an interpreter of its own, which finds its environment when it starts."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=function, args=(folder, rank, environment))
    with mock.patch.dict(os.environ, environment):
        process.start()
    return process


def _run_rank(folder: Path, rank: int, environment: dict[str, str]) -> None:
    """The life of a rank: what an interpreter of its own would do from its start to its end."""
    with _path(folder, rank, ".log").open("wb") as log:
        become_own_process(environment, log.fileno(), log.fileno())
    try:
        function, arguments = pickle.loads((folder / "call").read_bytes())
        result = function(*arguments)
    except BaseException:
        _path(folder, rank, FAILED).touch()
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # leaving the process group in order would wait for the other ranks
    _path(folder, rank).write_bytes(pickle.dumps(result))
    atexit._run_exitfuncs()  # a forked process ends without them: it would not leave its group


def become_own_process(environment: dict[str, str], stdout: int, stderr: int) -> None:
    """Gives a forked process a session, an environment and outputs of its own."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    # seeds that every interpreter takes from the system; Python's own draws anew by itself
    torch.seed()
    np.random.seed()


def _wait(processes: list[BaseProcess], deadline: float) -> None:
    """Waits for the end of all, or for the deadline, which a failure brings nearer."""
    seen_failure = False
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if not seen_failure and any(process.exitcode for process in processes):
            seen_failure = True
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)


def _first_failure(folder: Path, ended: list[int | None]) -> str:
    """The log of the rank that failed first; the others fail because they waited for it."""

    def moment(rank: int) -> int:  # a process that was killed could not leave one
        path = _path(folder, rank, FAILED)
        return path.stat().st_mtime_ns if path.exists() else 0

    first = min((rank for rank, code in enumerate(ended) if code), key=moment)
    log = _path(folder, first, ".log").read_text()
    return f"rank {first} failed, exit code {ended[first]}:\n{log}"


def _path(folder: Path, rank: int, suffix: str = ".result") -> Path:
    return folder / f"rank_{rank}{suffix}"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
