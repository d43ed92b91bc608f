"""Who am I among the processes of a run: ranks, device, process group.

The only file that reads or writes `os.environ`. Ranks come from torchrun (`RANK`, ...) or from srun
(`SLURM_PROCID`, ...); a plain `megadlcm train` is a run of one process and needs neither.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import InputError

DEFAULT_MASTER_PORT = 29400
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


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


@dataclass(frozen=True)
class ParallelMesh:
    """Ranks, sizes and device of this process; all processes are data-parallel replicas."""

    rank: int
    """Index of this process."""
    world_size: int
    """Processes of the run."""
    local_rank: int
    """Index of this process on its node."""
    device: torch.device
    """Where this process computes."""

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this process is."""
        return self.rank

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas."""
        return self.world_size

    @property
    def is_writer(self) -> bool:
        """Whether this process writes metrics, samples and the commit mark of a checkpoint."""
        return self.rank == 0

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Adds a tensor over all replicas, in place, without a gradient; returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each replica, in rank order, on every replica."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Hands the value of rank 0 to every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            dist.barrier()


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
            "start with torchrun or srun, or unset it for a run of one process"
        )
    rank, world_size, local_rank = (int(environ[key]) for key in keys)
    if rank >= world_size:
        raise InputError(
            f"environment: {keys[0]} = {rank}, must be < {keys[1]} = {world_size}; "
            "start with torchrun or srun"
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
    match = re.match(r"([^,\[]*)(?:\[([0-9]+)[^\]]*\])?([^,\[]*)", node_list)
    return "".join(part or "" for part in match.groups()) if match else ""


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this process; the CPU without a GPU, or where `DS_ACCELERATOR=cpu` asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank}: this node has {torch.cuda.device_count()} GPUs; "
            "start one process for each GPU, or set DS_ACCELERATOR=cpu"
        )
    return torch.device("cuda", local_rank)


def join_process_group() -> ParallelMesh:
    """Joins the run: picks the device and initialises the process group (gloo, or nccl on GPUs).

    A run of one process makes a group of its own in memory, so that it needs no port and nothing
    can collide with it. Safe to call again in the same process: the group stays until the process
    ends, because DeepSpeed remembers it beyond the life of an engine.

    Returns:
        Ranks and device of this process.

    Raises:
        InputError: the launcher's environment is incomplete.
    """
    launch = launch_environment()
    device = choose_device(launch.local_rank)
    # DeepSpeed refuses to start without LOCAL_RANK, and guesses the accelerator without the other
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _initialize(launch, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_process_group)
    return ParallelMesh(launch.rank, launch.world_size, launch.local_rank, device)


def _initialize(launch: LaunchEnvironment, backend: str) -> None:
    if launch.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    if not launch.master_address:
        raise InputError(
            f"environment: MASTER_ADDR is empty with {launch.world_size} processes; "
            "set it to the host of rank 0"
        )
    os.environ["MASTER_ADDR"] = launch.master_address
    os.environ["MASTER_PORT"] = str(launch.master_port)
    dist.init_process_group(
        backend, rank=launch.rank, world_size=launch.world_size, timeout=COLLECTIVE_TIMEOUT
    )


def leave_process_group() -> None:
    """Leaves the process group at the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
