"""A process that dies, stops or fails in a step: the others end soon and name it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.shard_format.table import decode_table
from megadlcm.parallel.environment import launch_environment
from megadlcm.parallel.rendezvous import _Rendezvous
from megadlcm.parallel.watch.heartbeat import Board
from tests.support.distributed import free_port, rank_environment
from tests.support.train_processes import last_step, write_run_file

pytestmark = pytest.mark.slow(13)

TIMEOUT = 4.0
"""parallel.collective_timeout_seconds of these runs."""
GRACE = 40.0
"""How long after that everything must be over, on a slow machine."""
LAYOUTS = {
    "data": {},
    "tensor_pipeline": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
Ranks = list["subprocess.Popen[str]"]
StartRanks = Callable[..., tuple[Ranks, Path]]


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[StartRanks]:
    """Function(world size, own words of a rank, **parallel) -> its processes and run folder."""
    started: Ranks = []

    def run(
        world_size: int, words_of: dict[int, list[str]] | None = None, **parallel: Any
    ) -> tuple[Ranks, Path]:
        folder = tmp_path / "run"
        timeout = {"collective_timeout_seconds": TIMEOUT}
        file = write_run_file(
            tmp_path / "run.yaml",
            corpus,
            folder,
            model={"token_kv_heads": 2},
            parallel=timeout | parallel,
            training={"train_steps": 100_000, "global_batch_size": 12, "micro_batch_size": 1},
            checkpoint={"interval_steps": 0},
            evaluation={"interval_steps": 0},
            data={"valid": []},
        )
        port = free_port()
        for rank in range(world_size):
            words = ["train", str(file), *(words_of or {}).get(rank, [])]
            started.append(start_rank(rank, world_size, port, words))
        return started, folder

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def start_rank(rank: int, world_size: int, port: int, words: list[str]) -> subprocess.Popen[str]:
    """One process of a run, as a launcher starts it."""
    environment = rank_environment(rank, world_size, port)
    return subprocess.Popen(
        [sys.executable, "-m", "megadlcm", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def wait_for_step(ranks: Ranks, folder: Path, step: int = 3) -> None:
    """Waits until a run is in the middle of its steps."""
    deadline = time.monotonic() + 120.0
    while last_step(folder) < step:
        for process in ranks:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def errors_of(ranks: Ranks, victim: int) -> list[str]:
    """The error line of each process but one, all of which must have ended with code 1."""
    lines = []
    for rank, process in enumerate(ranks):
        if rank == victim:
            continue
        _, complaints = process.communicate(timeout=TIMEOUT + GRACE)
        assert process.returncode == 1, complaints
        found = complaints.splitlines()  # and no stack of torch beside it
        assert len(found) == 1 and found[0].startswith("error: "), complaints
        lines.append(found[0])
    return lines


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_is_named(
    how: signal.Signals, layout: str, start: StartRanks
) -> None:
    world_size, victim = (2, 1) if layout == "data" else (4, 2)
    ranks, folder = start(world_size, **LAYOUTS[layout])
    wait_for_step(ranks, folder)
    ranks[victim].send_signal(how)
    for line in errors_of(ranks, victim):
        assert re.search(r"step \d+: rank \d+ \(\S+, pid \d+\)", line), line
        assert f"rank {victim} (" in line and f"pid {ranks[victim].pid}" in line, line
        assert "sends no heartbeat" in line
        # the phase alone: the rest of the line says "step" and "sends" whatever it was
        (phase,) = re.findall(r"(?: s| connection) in ([^;,]+)", line)
        known = r"all-(reduce|gather)|reduc|send|recv|pass|broadcast|computing"
        assert re.search(known, phase), line
        # nobody else is accused
        accused = re.findall(r"rank (\d+) \(\S+, pid \d+\) sends", line)
        assert accused == [str(victim)], line


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_rank_0_is_noticed(how: signal.Signals, start: StartRanks) -> None:
    """It holds the store on which the others show that they live; stopped, it never answers."""
    ranks, folder = start(2)
    wait_for_step(ranks, folder)
    ranks[0].send_signal(how)
    (line,) = errors_of(ranks, victim=0)
    assert "; rank 0 (" in line and f"pid {ranks[0].pid}" in line, line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_data_error_of_one_rank_is_told_to_the_others(
    victim: int, corpus: Path, tmp_path: Path, start: StartRanks
) -> None:
    """One rank reads a copy of the shards in which a bit of each document is wrong."""
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus / "train", damaged)
    (tar,) = damaged.glob("*.tar")
    (table,) = damaged.glob("*.documents.npy")
    content = bytearray(tar.read_bytes())
    for offset in decode_table(table.read_bytes()).rows["tokens_offset"]:
        content[offset] ^= 1
    tar.write_bytes(bytes(content))
    ranks, _ = start(2, {victim: [f"data.train=[{{path: {damaged}, name: train}}]"]})
    (line,) = errors_of(ranks, victim)
    assert f"rank {victim} (" in line and "failed: " in line and str(damaged) in line, line
    assert ranks[victim].wait(timeout=GRACE) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_data_error_before_the_rendezvous_is_told_too(
    victim: int, tmp_path: Path, start: StartRanks
) -> None:
    """It does not come to the rendezvous, which rank 0 would have opened."""
    nowhere = tmp_path / "nowhere"
    ranks, _ = start(2, {victim: [f"data.train=[{{path: {nowhere}, name: train}}]"]})
    (line,) = errors_of(ranks, victim)
    verb = "join" if victim else "open"
    assert line.startswith(f"error: rank {victim} did not {verb} the rendezvous"), line
    assert ranks[victim].wait(timeout=GRACE) == 2


def test_nothing_else_would_end_the_others(start: StartRanks) -> None:
    """Negative control: with a longer timeout they are still there when the others had ended."""
    ranks, folder = start(2, collective_timeout_seconds=600.0)
    wait_for_step(ranks, folder)
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(4 * TIMEOUT)
    assert ranks[0].poll() is None


def start_torchrun(corpus: Path, tmp_path: Path) -> tuple[subprocess.Popen[str], list[int], Path]:
    """Four processes of torchrun in the middle of their steps: launcher, pids by rank, folder."""
    folder = tmp_path / "run"
    file = write_run_file(
        tmp_path / "run.yaml",
        corpus,
        folder,
        parallel={"collective_timeout_seconds": TIMEOUT},
        training={"train_steps": 100_000, "global_batch_size": 4, "micro_batch_size": 1},
        checkpoint={"interval_steps": 0},
        data={"valid": []},
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node=4", f"--master-port={free_port()}"]
    launcher = subprocess.Popen(
        [sys.executable, *command, "-m", "megadlcm", "train", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    wait_for_step([launcher], folder)
    children = children_of(launcher.pid)
    assert len(children) == 4
    return launcher, children, folder


def test_torchrun_leaves_no_process_behind_and_the_killed_one_is_named_first(
    corpus: Path, tmp_path: Path
) -> None:
    launcher, children, _ = start_torchrun(corpus, tmp_path)
    wait_until_shown_in_a_step(children[2], rank=2)
    os.kill(children[2], signal.SIGKILL)
    _, complaints = launcher.communicate(timeout=TIMEOUT + 2 * GRACE)
    assert launcher.returncode == 1
    assert f"(SIGKILL) received by PID {children[2]}" in complaints
    # the launcher asks the others to end at once, but not before they could say whom it lost
    lines = [line for line in complaints.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3, complaints
    for line in lines:
        assert re.search(r"lost its connection in |was told to end \(SIGTERM\) in ", line), line
        assert re.findall(r"; rank (\d)", line)[0] == "2", line
        assert re.search(
            rf"rank 2 \(\S+, pid {children[2]}\) sends no .*; last seen in step \d+", line
        )
        accused = re.findall(r"rank (\d+) \(\S+, pid \d+\) sends", line)
        assert accused == ["2"], line
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("lost", [2, None])
def test_who_is_told_to_end_where_rank_0_holds_the_board_accuses_nobody_else(
    lost: int | None, start: StartRanks
) -> None:
    """As srun ends a step: of one that it lost the others, of one that is cancelled all."""
    ranks, folder = start(3)
    wait_for_step(ranks, folder)
    if lost is not None:
        ranks[lost].kill()
    told = [process for rank, process in enumerate(ranks) if rank != lost]
    for process in told:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    for process in told:
        _, complaints = process.communicate(timeout=TIMEOUT + GRACE)
        (line,) = complaints.splitlines()  # and no stack of torch beside it
        assert re.search(r"lost its connection in |was told to end \(SIGTERM\) in ", line), line
        accused = re.findall(r"rank (\d) \(\S+, pid \d+\) (?:sends no|is gone|does not)", line)
        assert accused == ([] if lost is None else [str(lost)]), line
        assert process.returncode in (1, 128 + signal.SIGTERM)


def test_workers_of_a_launcher_that_was_killed_end_by_themselves(
    corpus: Path, tmp_path: Path, adopts_orphans: None
) -> None:
    launcher, children, folder = start_torchrun(corpus, tmp_path)
    launcher.kill()
    launcher.wait()
    for rank, pid in enumerate(children):
        deadline = time.monotonic() + TIMEOUT + GRACE
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, f"rank {rank} goes on"
            time.sleep(0.1)
        assert os.waitstatus_to_exitcode(ended[1]) == 1
        log = (folder / "logs" / f"rank_{rank:04d}.log").read_text()
        assert "the launcher is gone" in log
    assert launcher.stderr is not None
    with launcher.stderr as complaints:
        lines = complaints.read().splitlines()
    # and no stack of torch beside them, whose store is gone
    assert len(lines) == 4 and all(line.startswith("error: step ") for line in lines), lines


def test_a_single_process_whose_launcher_ended_before_it_looked_does_not_train(
    start: StartRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ended while libraries were imported: the parent is another one by then."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "True")
    ranks, folder = start(1)
    (line,) = errors_of(ranks, victim=-1)
    assert line.startswith("error: rank 0: the launcher is gone"), line
    assert last_step(folder) == 0


@pytest.fixture
def adopts_orphans() -> Iterator[None]:
    """This process inherits those whose parents end, and so knows how they end."""
    set_child_subreaper = 36
    library = ctypes.CDLL(None, use_errno=True)
    assert library.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    yield
    library.prctl(set_child_subreaper, 0, 0, 0, 0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_open_its_log_is_named_by_the_others(
    victim: int, start: StartRanks, tmp_path: Path
) -> None:
    """Before the first step, where nothing but the rendezvous has happened."""
    (tmp_path / "run" / "logs" / f"rank_{victim:04d}.log").mkdir(parents=True)
    ranks, _ = start(2)
    (line,) = errors_of(ranks, victim)
    assert f"rank {victim} (" in line and "failed: " in line and "rank_000" in line, line
    _, complaints = ranks[victim].communicate(timeout=GRACE)
    assert ranks[victim].returncode == 2 and complaints.count("error: ") == 1


def wait_until_shown_in_a_step(pid: int, rank: int) -> None:
    """Waits until the board shows a process of torchrun in a step, as others would find it."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    launch = launch_environment(dict(entry.split("=", 1) for entry in entries if entry))
    store = _Rendezvous(launch, "tiny", timeout_seconds=60.0)._connect()
    start, _ = json.loads(store.get("rendezvous/start"))
    board = Board(dist.PrefixStore(start, store), launch.world_size, patience=60.0)  # type: ignore[attr-defined]
    deadline = time.monotonic() + 120.0
    while not any(one.place.startswith("step ") for one in (board.read([rank]) or {}).values()):
        assert time.monotonic() < deadline, "it never came to a step"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """Processes that a process started, oldest first."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(int(child) for child in path.read_text().split())
