"""What the variables of launchers say, and what cannot be."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from data_pipeline.errors import InputError
from megadlcm.parallel.environment import (
    DEFAULT_MASTER_PORT,
    LaunchEnvironment,
    adopt_device,
    choose_device,
    first_host,
    launch_environment,
)

BY_HAND = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29512",
}
TORCHRUN = BY_HAND | {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
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
    "SLURM_STEP_ID": "4",
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
    expected = LaunchEnvironment(
        3, 8, 1, "10.0.0.7", 29512, "torchrun none", True, is_child_of_launcher=True
    )
    assert launch_environment(TORCHRUN) == expected
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE: the store is with rank 0, the parent is the launcher
    shared = launch_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert shared == dataclasses.replace(expected, is_store_of_launcher=False)


def test_what_torchrun_says_may_be_said_by_hand() -> None:
    assert launch_environment(BY_HAND) == LaunchEnvironment(3, 8, 1, "10.0.0.7", 29512)


def test_a_task_of_srun_meets_the_others_on_the_first_node_of_its_step() -> None:
    port = 20_000 + (123456 * 131 + 4) % 9000
    start = "Slurm job 123456, step 4, start 0"
    expected = LaunchEnvironment(9, 16, 1, "gpu008", port, start, has_own_device=True)
    assert launch_environment(SRUN_TASK) == expected


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


SHELL = {"RANK": "0", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "left",
    [SHELL, SHELL | {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, BY_HAND],
    ids=["shell", "all variables", "another size"],
)
def test_ranks_that_a_shell_left_over_do_not_make_each_task_a_run(left: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        launch_environment(SRUN_TASK | left)
    message = str(caught.value)
    for part in (f"RANK = {left['RANK']} ", f"WORLD_SIZE = {left['WORLD_SIZE']},", "torchrun"):
        assert part in message
    assert "SLURM_STEP_NUM_TASKS = 16" in message and "unset RANK and WORLD_SIZE" in message


def test_ranks_that_agree_with_sruns_are_no_contradiction() -> None:
    """Batch scripts export them for libraries that read nothing else."""
    agreed = {"RANK": "9", "WORLD_SIZE": "16"}
    assert launch_environment(SRUN_TASK | agreed) == launch_environment(SRUN_TASK)


def test_a_shell_in_a_single_task_may_start_several_processes() -> None:
    """That of `srun --pty bash`: whatever it starts inherits the variables of its task."""
    shell = SRUN_TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert launch_environment(shell | BY_HAND) == launch_environment(BY_HAND)
    assert launch_environment(shell).world_size == 1


def test_runs_of_slurm_that_may_share_a_node_do_not_meet_on_one_port() -> None:
    """Jobs a thousand ids apart, steps of a job, and a start after one whose port was taken."""
    starts: tuple[dict[str, str], ...] = (
        {},
        {"SLURM_JOB_ID": "123457"},
        {"SLURM_JOB_ID": "124456"},
        {"SLURM_JOB_ID": "99"},
        {"SLURM_STEP_ID": "5"},
        {"SLURM_RESTART_COUNT": "1"},
    )
    launches = [launch_environment(SRUN_TASK | start) for start in starts]
    assert len({launch.master_port for launch in launches}) == len(starts)
    assert len({launch.start for launch in launches}) == len(starts)
    assert all(20_000 <= launch.master_port < 29_000 for launch in launches)
    # nothing but what all tasks of a step share
    other_task = SRUN_TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert launch_environment(other_task).master_port == launches[0].master_port
    assert launch_environment(without(TORCHRUN, "MASTER_PORT")).master_port == DEFAULT_MASTER_PORT


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), ["LOCAL_RANK", "RANK is set"]),
        ({"RANK": "3"}, ["WORLD_SIZE, LOCAL_RANK", "RANK is set"]),
        ({"WORLD_SIZE": "8"}, ["RANK, LOCAL_RANK", "WORLD_SIZE is set"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK = 8", "WORLD_SIZE = 8"]),
        (TORCHRUN | {"LOCAL_RANK": "8"}, ["LOCAL_RANK = 8", "WORLD_SIZE = 8"]),
        (without(SRUN_TASK, "SLURM_PROCID"), ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS"]),
        (
            without(without(SRUN_TASK, "SLURM_PROCID"), "SLURM_LOCALID"),
            ["SLURM_PROCID", "SLURM_LOCALID"],
        ),
        (SRUN_TASK | {"SLURM_PROCID": "16"}, ["SLURM_PROCID = 16", "SLURM_STEP_NUM_TASKS = 16"]),
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


NUMBERS = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"), TORCHRUN),
    **dict.fromkeys(
        (
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID",
            "SLURM_JOB_ID",
            "SLURM_STEP_ID",
            "SLURM_RESTART_COUNT",
            "SLURM_GPUS_ON_NODE",
        ),
        SRUN_TASK,
    ),
}
# the digits of other scripts, of which int() takes the second and str.isdigit() both
ODD = ["", "abc", "-1", "+1", "1.0", "1_0", " 1", "1\n", "2(x3)", "\u00b2", "\u0663", "9" * 5000]


@pytest.mark.parametrize("key", NUMBERS)
def test_what_is_no_number_is_refused_in_every_variable(key: str) -> None:
    right = "7" if NUMBERS[key] is TORCHRUN else "12"
    launch_environment(NUMBERS[key] | {key: right})
    for text in ODD:
        with pytest.raises(InputError) as caught:
            launch_environment(NUMBERS[key] | {key: text})
        message = str(caught.value)
        assert f"{key} = {text!r}, must be a whole number from" in message
        assert "start with torchrun or srun" in message and "\n" not in message


@pytest.mark.parametrize(
    ("key", "texts", "rule"),
    [
        ("MASTER_PORT", ["0", "70000"], "from 1 to 65535"),
        ("WORLD_SIZE", ["0"], "from 1 to"),
        ("MASTER_ADDR", ["http://host", "a b", "host:\u00e9", "[::1]"], "a host name or an IP"),
        ("TORCHELASTIC_USE_AGENT_STORE", ["true", "1", ""], "must be True or False"),
    ],
)
def test_what_cannot_be_is_refused_with_its_rule(key: str, texts: list[str], rule: str) -> None:
    for text in texts:
        with pytest.raises(InputError, match=rule) as caught:
            launch_environment(TORCHRUN | {key: text})
        assert f"{key} = {text!r}" in str(caught.value)


@pytest.mark.parametrize("address", ["node-3.cluster.local", "my_host", "10.0.0.7", "fe80::1%eth0"])
def test_names_and_addresses_are_taken(address: str) -> None:
    assert launch_environment(TORCHRUN | {"MASTER_ADDR": address}).master_address == address


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
        ("rack[1-2]n[03-07]", "rack1n03"),
        ("x1000c0s[0-3]b[0-1]n0", "x1000c0s0b0n0"),
        ("a-[1,3-4]b", "a-1b"),
        ("a-[1,3-4]b,c[5-6]", "a-1b"),
        ("c5,a-[1,3-4]b", "c5"),
        ("[10-12]", "10"),
        ("127.0.1.[1-4]", "127.0.1.1"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "nodes", ["rack[1-", "rack1-2]", "n[[1-2]]", "n[]", "n[a-b]", ",n1", "n1,", "n 1", "(null)"]
)
def test_what_is_no_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(InputError) as caught:
        launch_environment(SRUN_TASK | {"SLURM_STEP_NODELIST": nodes})
    message = str(caught.value)
    assert f"SLURM_STEP_NODELIST = {nodes!r}" in message and "set MASTER_ADDR" in message
    # the way out is one
    given = SRUN_TASK | {"SLURM_STEP_NODELIST": nodes, "MASTER_ADDR": "node1"}
    assert launch_environment(given).master_address == "node1"


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def on_node(local_rank: int, has_own_device: bool = False) -> LaunchEnvironment:
    return LaunchEnvironment(9, 16, local_rank, has_own_device=has_own_device)


def test_more_processes_than_gpus_are_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see_gpus(monkeypatch, 4)
    for has_own in (False, True):
        assert choose_device(on_node(3, has_own)) == torch.device("cuda", 3)
        with pytest.raises(InputError, match=r"local rank 4: .*: 4; .*DS_ACCELERATOR=cpu"):
            choose_device(on_node(4, has_own))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose_device(on_node(4)) == torch.device("cpu")


def test_a_task_takes_the_one_gpu_that_slurm_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of one node see one device each: their own, if the node has one for each."""
    see_gpus(monkeypatch, 1)
    task = SRUN_TASK | {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}
    for gpus in ({"SLURM_GPUS_ON_NODE": "4"}, {}):  # {}: Slurm knows no GPUs, a wrapper chose
        assert choose_device(launch_environment(task | gpus)) == torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"local rank 3: .*: 1; .*--gpus-per-task=1"):
        choose_device(launch_environment(task | {"SLURM_GPUS_ON_NODE": "1"}))


def test_processes_of_torchrun_do_not_share_the_one_gpu_they_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They inherit one environment: what one of them sees is what all see."""
    see_gpus(monkeypatch, 1)
    inside_srun = SRUN_TASK | {"SLURM_GPUS_ON_NODE": "4"} | TORCHRUN
    for environ in (BY_HAND, TORCHRUN, inside_srun):
        assert choose_device(launch_environment(environ | {"LOCAL_RANK": "0"})).index == 0
        with pytest.raises(InputError, match=r"local rank 1: .*: 1; "):
            choose_device(launch_environment(environ))


def test_deepspeed_is_told_the_number_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes LOCAL_RANK for that, and a device of that number need not exist."""
    adopted: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", adopted.append)
    for key in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(key, "")  # to be put back
    for device, local_rank in (("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "3")):
        adopt_device(on_node(3), torch.device(device))
        assert os.environ["LOCAL_RANK"] == local_rank
    assert adopted == [torch.device("cuda", 0), torch.device("cuda", 3)]


def test_without_a_gpu_every_process_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    assert choose_device(on_node(0)) == choose_device(on_node(5)) == torch.device("cpu")


def test_an_accelerator_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    for accelerator, rule in (("CPU", "cpu or cuda"), ("", "cpu or cuda"), ("cuda", "no CUDA")):
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
        with pytest.raises(InputError, match=rule) as caught:
            choose_device(on_node(0))
        assert f"DS_ACCELERATOR = {accelerator!r}" in str(caught.value)
    see_gpus(monkeypatch, 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert choose_device(on_node(0)) == torch.device("cuda", 0)
