"""What the launcher says about this process: rank, sizes, address; and its device.

The only file that reads or writes `os.environ`. Ranks come from torchrun (`RANK`, ...) or from srun
(`SLURM_PROCID`, ...); a plain `megadlcm train` is a run of one process and needs neither.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from data_pipeline.errors import InputError

DEFAULT_MASTER_PORT = 29400


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher says about this process."""

    rank: int = 0
    """Index of this process, 0 to world_size - 1."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Index of this process on its node; also the index of its GPU."""
    master_address: str = ""
    """Host of rank 0; empty for a run of one process."""
    master_port: int = 0
    """Port on which rank 0 listens."""


def launch_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Reads rank and sizes from torchrun or srun.

    A batch script of Slurm also has `SLURM_PROCID` and `SLURM_NTASKS` in its environment although
    it is a single process; only a task of srun has `SLURM_STEP_NUM_TASKS`, so that one decides.

    Args:
        environ: the environment to read; None means this process's own.

    Returns:
        The environment of this process; one process where no launcher is seen.

    Raises:
        InputError: a launcher gave only part of what is needed.
    """
    environ = os.environ if environ is None else environ
    # torchrun may run inside a task of srun: then what it says counts, if it says all of it
    complete = "RANK" in environ and "WORLD_SIZE" in environ
    if "SLURM_STEP_NUM_TASKS" in environ and not complete:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = environ.get("MASTER_ADDR") or first_host(nodes)
    elif "RANK" in environ or "WORLD_SIZE" in environ:
        keys, address = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), environ.get("MASTER_ADDR", "")
    else:
        return LaunchEnvironment()
    missing = [key for key in keys if not environ.get(key, "").isdigit()]
    if missing:
        given = next(key for key in keys if key in environ)
        raise InputError(
            f"environment: {', '.join(missing)} missing or not a number although {given} is set; "
            "start with torchrun or srun, or unset it for a run of one process",
        )
    rank, world_size, local_rank = (int(environ[key]) for key in keys)
    if rank >= world_size:
        raise InputError(
            f"environment: {keys[0]} = {rank}, must be < {keys[1]} = {world_size}; "
            "start with torchrun or srun",
        )
    port = environ.get("MASTER_PORT", "")
    return LaunchEnvironment(
        rank,
        world_size,
        local_rank,
        address,
        int(port) if port.isdigit() else _default_port(environ),
    )


def _default_port(environ: Mapping[str, str]) -> int:
    # two jobs on one node must not meet on one port, and every rank must find the same one
    job = environ.get("SLURM_JOB_ID", "0")
    return DEFAULT_MASTER_PORT + (int(job) % 1000 if job.isdigit() else 0)


def first_host(node_list: str) -> str:
    """First host of a Slurm node list: `node[03-07,9],other` is `node03`."""
    # the prefix, the first number inside of brackets as it is written, and what follows them
    match = re.match(r"([^,\[]*)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", node_list)
    return "".join(part or "" for part in match.groups()) if match else ""


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this process; the CPU without a GPU, or where `DS_ACCELERATOR=cpu` asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank}: this node has {torch.cuda.device_count()} GPUs; "
            "start one process for each GPU, or set DS_ACCELERATOR=cpu",
        )
    return torch.device("cuda", local_rank)


def adopt_device(launch: LaunchEnvironment, device: torch.device) -> None:
    """Tells torch and DeepSpeed which device is this process's.

    Args:
        launch: what the launcher says about this process.
        device: its device.
    """
    # DeepSpeed refuses to start without LOCAL_RANK, and guesses the accelerator without the other
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)


def announce_address(launch: LaunchEnvironment) -> None:
    """Tells libraries that read the environment where rank 0 listens."""
    os.environ["MASTER_ADDR"] = launch.master_address
    os.environ["MASTER_PORT"] = str(launch.master_port)


def launcher_store() -> tuple[bool, str]:
    """Whether rank 0 hosts the store of the run, and the name of this start of the processes.

    torchrun keeps the store in its agent, also when it starts the processes again.
    """
    # the name keeps apart what an earlier start has left in that store
    by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return by_rank_0, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
