from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from data_pipeline.errors import InputError
from megadlcm.parallel.environment import (
    DEFAULT_MASTER_PORT,
    LaunchEnvironment,
    choose_device,
    first_host,
    launch_environment,
)
from megadlcm.parallel.process_group import join_process_group
from tests.support.distributed import RankFailedError, run_distributed

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29512",
}
# what a batch script sees: one process, although the counts of the job are there
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
}
SRUN_TASK = BATCH_SCRIPT | {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[008,012]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def without(environ: dict[str, str], key: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name != key}


@pytest.mark.parametrize("environ", [{}, {"PATH": "/bin"}, BATCH_SCRIPT])
def test_a_start_without_a_launcher_is_one_process(environ: dict[str, str]) -> None:
    """A batch script of Slurm is one: waiting there for 16 processes would hang for ever."""
    assert launch_environment(environ) == LaunchEnvironment(0, 1, 0, "", 0)


def test_torchrun_says_everything() -> None:
    assert launch_environment(TORCHRUN) == LaunchEnvironment(3, 8, 1, "10.0.0.7", 29512)


def test_a_task_of_srun_meets_the_others_on_the_first_node_of_its_step() -> None:
    assert launch_environment(SRUN_TASK) == LaunchEnvironment(9, 16, 1, "gpu008", 29400 + 456)


def test_srun_on_all_nodes_of_the_job_needs_no_node_list_of_its_own() -> None:
    launch = launch_environment(without(SRUN_TASK, "SLURM_STEP_NODELIST"))
    assert launch.master_address == "gpu007"


def test_a_given_address_and_port_have_precedence_over_slurms() -> None:
    given = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"}
    launch = launch_environment(SRUN_TASK | given)
    assert (launch.master_address, launch.master_port) == ("10.1.1.1", 4000)


def test_a_world_size_that_the_batch_script_exports_does_not_confuse_the_tasks() -> None:
    assert launch_environment(SRUN_TASK | {"WORLD_SIZE": "16"}) == launch_environment(SRUN_TASK)


def test_torchrun_inside_a_task_of_srun_decides() -> None:
    assert launch_environment(SRUN_TASK | TORCHRUN) == launch_environment(TORCHRUN)


def test_two_jobs_on_one_node_do_not_meet_on_one_port() -> None:
    ports = {
        launch_environment(SRUN_TASK | {"SLURM_JOB_ID": job}).master_port
        for job in ("123456", "123457", "99")
    }
    assert len(ports) == 3 and all(0 <= port - DEFAULT_MASTER_PORT < 1000 for port in ports)
    assert launch_environment(without(TORCHRUN, "MASTER_PORT")).master_port == DEFAULT_MASTER_PORT


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), ["LOCAL_RANK", "RANK is set"]),
        ({"RANK": "3"}, ["WORLD_SIZE, LOCAL_RANK", "RANK is set"]),
        ({"WORLD_SIZE": "8"}, ["RANK, LOCAL_RANK", "WORLD_SIZE is set"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK = 8", "WORLD_SIZE = 8"]),
        (TORCHRUN | {"RANK": "one"}, ["RANK"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK"]),
        (TORCHRUN | {"WORLD_SIZE": ""}, ["WORLD_SIZE"]),
        (without(SRUN_TASK, "SLURM_PROCID"), ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]),
        (
            without(without(SRUN_TASK, "SLURM_PROCID"), "SLURM_LOCALID"),
            ["SLURM_PROCID", "SLURM_LOCALID"],
        ),
        (SRUN_TASK | {"SLURM_STEP_NUM_TASKS": "2(x3)"}, ["SLURM_STEP_NUM_TASKS"]),
    ],
)
def test_half_an_environment_is_an_error_of_one_line_that_names_what_is_missing(
    environ: dict[str, str], named: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        launch_environment(environ)
    message = str(caught.value)
    assert all(key in message for key in named) and "\n" not in message
    assert "torchrun or srun" in message


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node03", "node03"),
        ("node03,node04", "node03"),
        ("node[03-07,9],other", "node03"),
        ("node[3]", "node3"),
        ("node[0012,0013]", "node0012"),
        ("rack-2-node[1-4]-ib,login", "rack-2-node1-ib"),
        ("a.b.example", "a.b.example"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_more_processes_than_gpus_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device(3) == torch.device("cuda", 3)
    with pytest.raises(InputError, match=r"local rank 4: .* 4 GPUs; .*DS_ACCELERATOR=cpu"):
        choose_device(4)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device(4) == torch.device("cpu")


def test_without_a_gpu_every_process_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(0) == choose_device(5) == torch.device("cpu")


def test_a_run_of_one_process_makes_a_group_of_its_own() -> None:
    mesh = join_process_group()
    assert join_process_group() == mesh
    assert (mesh.data_parallel_rank, mesh.data_parallel_size, mesh.is_writer) == (0, 1, True)
    assert mesh.sum_over_data_parallel(torch.tensor([2.0])).tolist() == [2.0]
    assert mesh.gather_over_data_parallel("a") == ["a"] and mesh.broadcast_object("b") == "b"


def collect_on_each_rank() -> dict[str, Any]:
    mesh = join_process_group()
    mesh.barrier()
    return {
        "rank": (mesh.rank, mesh.world_size, mesh.local_rank, mesh.is_writer),
        "sum": mesh.sum_over_data_parallel(torch.tensor([1.0, mesh.rank])).tolist(),
        "gathered": mesh.gather_over_data_parallel({"rank": mesh.rank}),
        "broadcast": mesh.broadcast_object(f"from {mesh.rank}"),
    }


def fail_on_one_rank() -> None:
    mesh = join_process_group()
    if mesh.rank == 1:
        raise ValueError("only here")
    mesh.barrier()
    time.sleep(600.0)


@pytest.mark.slow
def test_ranks_sum_gather_and_broadcast_alike() -> None:
    results = run_distributed(collect_on_each_rank, 2)
    assert [result.pop("rank") for result in results] == [(0, 2, 0, True), (1, 2, 1, False)]
    expected = {
        "sum": [2.0, 1.0],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "broadcast": "from 0",
    }
    assert results == [expected, expected]


def wait_for_ever() -> None:
    time.sleep(600.0)


@pytest.mark.slow
def test_a_rank_that_fails_is_named_although_another_one_waits_for_it() -> None:
    """Of the launcher that the parallel tests rely on: it neither hangs nor hides the reason."""
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed.*ValueError: only here"):
        run_distributed(fail_on_one_rank, 2)
    with pytest.raises(RankFailedError, match=r"(?s)timed out.*rank_0"):
        run_distributed(wait_for_ever, 1, timeout_seconds=1.0)
