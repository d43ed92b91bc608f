"""Processes that are started where others meet, or where a foreign program listens."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from megadlcm.commands.main import main
from megadlcm.run_folder.rows import read_rows, training_rows
from tests.support.distributed import become_own_process, fork, free_port, rank_environment
from tests.support.paths import ROOT
from tests.support.train_processes import START_SECONDS, write_run_file

pytestmark = pytest.mark.slow(8)

TWO = {"global_batch_size": 4, "micro_batch_size": 1, "train_steps": 2}


def launch(file: Path, rank: int, port: int, log: Path, address: str = "127.0.0.1") -> BaseProcess:
    """One process of a run of two."""
    environment = rank_environment(rank, 2, port) | {"MASTER_ADDR": address}
    return fork(_train, str(file), environment, str(log))


def _train(file: str, environment: dict[str, str], log: str) -> None:
    with open(log, "wb") as output:
        become_own_process(environment, output.fileno(), output.fileno())
    code = main(["train", file])
    atexit._run_exitfuncs()  # a forked process ends without them
    sys.exit(code)


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody listens on port {port}")


def test_two_runs_under_one_address_keep_to_themselves(corpus: Path, tmp_path: Path) -> None:
    """The second comes while the first waits for its rank 1, whose place it could take."""
    files = {
        name: write_run_file(
            tmp_path / f"{name}.yaml", corpus, tmp_path / name, name=name, training=TWO
        )
        for name in ("first", "second")
    }
    port = free_port()
    log = tmp_path / "log"
    ranks: list[BaseProcess] = []

    def start(name: str, rank: int) -> BaseProcess:
        ranks.append(launch(files[name], rank, port, log.with_name(f"{name}_{rank}.log")))
        return ranks[-1]

    def end(process: BaseProcess, name: str, rank: int) -> str:
        process.join(timeout=START_SECONDS)
        said = log.with_name(f"{name}_{rank}.log").read_text()
        return f"{process.exitcode} {said}"

    try:
        first = start("first", 0)
        wait_for_listener(port)
        strangers = [start("second", rank) for rank in (1, 0)]
        foreign, refused = end(strangers[0], "second", 1), end(strangers[1], "second", 0)
        assert foreign.startswith("1 error: rank 1 of second of 2 processes finds another run")
        assert "first of 2 processes" in foreign and f"127.0.0.1:{port}" in foreign
        assert refused.startswith("1 error: rank 0 of second of 2 processes cannot open")
        assert all("MASTER_PORT" in said and said.count("\n") == 1 for said in (foreign, refused))
        last = start("first", 1)
        assert end(last, "first", 1).startswith("0 ")
        assert end(first, "first", 0).startswith("0 ")
    finally:
        for process in ranks:
            process.kill()
            process.join()
    rows = training_rows(read_rows(tmp_path / "first"))
    assert [(row["step"], row["world_size"]) for row in rows] == [(1, 2), (2, 2)]
    assert not training_rows(read_rows(tmp_path / "second"))


LONELY = [
    (0, "127.0.0.1", ["rank 0 of tiny of 2 processes cannot open", "the port is taken"]),
    (1, "127.0.0.1", ["rank 1: rank 0 at", "another program listens there"]),
    (0, "no-such-host.invalid", ["rank 0 does not reach itself", "MASTER_ADDR"]),
    (1, "no-such-host.invalid", ["rank 0 did not open", "MASTER_ADDR"]),
]


def test_who_meets_nobody_says_where_in_one_line_and_ends(corpus: Path, tmp_path: Path) -> None:
    """A program that never answers has the port at the one address; nobody knows the other."""
    files = [
        write_run_file(
            tmp_path / f"{number}.yaml",
            corpus,
            tmp_path / str(number),
            parallel={"collective_timeout_seconds": 2.0},
            training=TWO,
        )
        for number in range(len(LONELY))
    ]
    processes: list[BaseProcess] = []
    taken, free = socket.create_server(("127.0.0.1", 0)), free_port()
    with taken:
        ports = {"127.0.0.1": taken.getsockname()[1], "no-such-host.invalid": free}
        try:
            for (rank, host, _), file in zip(LONELY, files, strict=True):
                processes.append(launch(file, rank, ports[host], file.with_suffix(".log"), host))
            for process in processes:
                process.join(timeout=START_SECONDS)
        finally:
            for process in processes:
                process.kill()
    for (_, host, named), file, process in zip(LONELY, files, processes, strict=True):
        line = file.with_suffix(".log").read_text()
        assert (process.exitcode, line.count("\n")) == (1, 1), line
        assert line.startswith("error: ") and f"{host}:{ports[host]}" in line
        assert [part for part in named if part not in line] == []


# what a process of torchrun runs: in the first start, rank 1 fails after all have met
WORKER = """
import json, os, sys, time
from dataclasses import asdict
from pathlib import Path
from megadlcm.config import ParallelConfig
from megadlcm.parallel.environment import launch_environment
from megadlcm.parallel.process_group import join_process_group

launch, folder = launch_environment(), Path(sys.argv[1])
is_first = not (folder / "failed").exists()
mesh = join_process_group(ParallelConfig(collective_timeout_seconds=10.0))
mesh.barrier()
if launch.rank == 1 and is_first:
    (folder / "failed").touch()
    os._exit(1)
if is_first:
    time.sleep(600.0)  # until the launcher ends it: that it failed too would be counted as well
told = {"launch": asdict(launch), "gathered": mesh.gather_over_run(mesh.rank)}
told["count"] = os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"{mesh.rank}.json").write_text(json.dumps(told))
mesh.barrier()
"""


@pytest.mark.slow(20)
def test_torchrun_inside_of_srun_starts_a_run_again(tmp_path: Path) -> None:
    """It keeps the store, and a task of srun on each node says other ranks than torchrun does."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "rack[1-2]n[03-04]",
    }
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    words = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}"]
    launcher = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env=os.environ | task | own,
    )
    assert launcher.returncode == 0, launcher.stderr
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["gathered"] == [0, 1]
        seen = told["launch"]
        assert (seen["rank"], seen["world_size"], seen["local_rank"]) == (rank, 2, rank)
        assert seen["start"].startswith("torchrun ") and seen["is_store_of_launcher"]
        assert not seen["has_own_device"]  # nothing tells two workers of torchrun apart but ranks
        assert told["count"] == "1"


@pytest.mark.slow(30)
def test_agents_of_torchrun_that_count_their_starts_apart_meet_again(tmp_path: Path) -> None:
    """The agent whose process failed counts a restart; that of the other node counts none."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    words = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
    words += ["--rdzv-id=both", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(worker), str(tmp_path)]
    logs = [tmp_path / f"agent{number}.log" for number in range(2)]
    agents = []
    try:
        for log in logs:
            with log.open("wb") as file:
                agents.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | own)
                )
        codes = [agent.wait(timeout=2 * START_SECONDS) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert codes == [0, 0], [log.read_text() for log in logs]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["gathered"] for one in told] == [[0, 1], [0, 1]]
    assert all(one["launch"]["is_store_of_launcher"] for one in told)
    # else it would prove nothing
    assert sorted(one["count"] for one in told) == ["0", "1"]
