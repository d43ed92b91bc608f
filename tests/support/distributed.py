"""Runs a function on several gloo processes, started the way torchrun starts them."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

TIMEOUT_SECONDS = 300
_GRACE_SECONDS = 5.0
"""How long the others may go on after one process failed: most of them then fail by themselves."""
_POLL_SECONDS = 0.05
FAILED = ".failed"


class RankFailedError(AssertionError):
    """A process failed; the message is its traceback."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """Calls a function on each rank of a run and returns what the ranks returned, in rank order.

    A launch takes seconds, most of them for imports: let one function do many checks.

    Args:
        function: a function at the top of a module.
        world_size: how many processes.
        arguments: picklable.
        timeout_seconds: when the processes are killed.

    Raises:
        RankFailedError: a process failed, or the time is over.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, arguments)))
        port = free_port()
        processes = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            _wait(processes, time.monotonic() + timeout_seconds)
            ended = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
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
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def _start(folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    environment = rank_environment(rank, world_size, port)
    with _path(folder, rank, ".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.distributed", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | environment,
        )


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Waits for the end of all, or for the deadline, which a failure brings nearer."""
    seen_failure = False
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if not seen_failure and any(process.poll() for process in processes):
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


def _main() -> int:
    folder = Path(sys.argv[1])
    try:
        function, arguments = pickle.loads((folder / "call").read_bytes())
        result = function(*arguments)
    except BaseException:
        _path(folder, int(os.environ["RANK"]), FAILED).touch()
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # leaving the process group in order would wait for the other ranks
    _path(folder, int(os.environ["RANK"])).write_bytes(pickle.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
