"""Who am I among the processes of a run: ranks, device, process group.

The only file that reads or writes `os.environ`. Ranks come from torchrun (`RANK`, ...) or from srun
(`SLURM_PROCID`, ...); a plain `megadlcm train` is a run of one process and needs neither.
"""

from __future__ import annotations

import atexit
import dataclasses
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
from megadlcm.config import ParallelConfig
from megadlcm.parallel.liveness import doing, start_watch, stop_watch
from megadlcm.parallel.meeting import open_store, wait_for_all

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


@dataclass(frozen=True)
class ParallelMesh:
    """Ranks, sizes and groups of this process on the axes of the run.

    rank = (pipeline_rank * data_parallel_size + data_parallel_rank) * tensor_parallel_size
    + tensor_parallel_rank: processes that share a layer are neighbours, stages are far apart.
    A group is None where its axis has one process.
    """

    rank: int
    """Index of this process."""
    world_size: int
    """Processes of the run."""
    local_rank: int
    """Index of this process on its node."""
    device: torch.device
    """Where this process computes."""
    tensor_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_parallel_size: int = 1
    """Stages."""
    tensor_parallel_group: dist.ProcessGroup | None = None
    """Processes that share this one's layers."""
    data_parallel_group: dist.ProcessGroup | None = None
    """Processes that hold the same part of the model."""
    model_parallel_group: dist.ProcessGroup | None = None
    """Processes that hold one replica of the model together."""
    pipeline_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """Processes with this one's place on all stages, once for messages to later stages and once
    for those to earlier ones: on one NCCL group a send and a receive would wait for each other."""

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def tensor_parallel_rank(self) -> int:
        """Which part of each layer this process holds."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_rank(self) -> int:
        """Which stage this process is."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)

    @property
    def is_writer(self) -> bool:
        """Whether this process writes metrics, samples and the commit mark of a checkpoint."""
        return self.rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this process reads the samples of its replica and hands them to the others."""
        return self.tensor_parallel_rank == 0 and self.pipeline_rank == 0

    def rank_of_stage(self, stage: int) -> int:
        """The process with this one's place in its layers and replicas, on another stage."""
        per_stage = self.tensor_parallel_size * self.data_parallel_size
        return stage * per_stage + self.rank % per_stage

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Adds a tensor over all replicas, in place, without a gradient; returns the tensor."""
        if self.data_parallel_size > 1:
            with doing("data parallel sum"):
                dist.all_reduce(values, group=self.data_parallel_group)
        return values

    def sum_over_run(self, values: Tensor) -> Tensor:
        """Adds what each process contributes to the whole run, in place.

        What the processes of a tensor parallel group know alike is counted on the first of them.
        """
        if self.tensor_parallel_rank:
            values.zero_()
        return self.sum_everywhere(values)

    def sum_everywhere(self, values: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place."""
        if self.world_size > 1:
            with doing("sum over all processes"):
                dist.all_reduce(values)
        return values

    def gather_over_data_parallel(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each replica, in order, on every replica."""
        if self.data_parallel_size == 1:
            return [value]
        values: list[Any] = [None] * self.data_parallel_size
        with doing("data parallel gather"):
            dist.all_gather_object(values, value, group=self.data_parallel_group)
        return values

    def gather_over_run(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each process, in rank order, everywhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with doing("gather over the run"):
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Hands the value of rank 0 to every process."""
        if self.world_size == 1:
            return value
        values = [value]
        with doing("broadcast from rank 0"):
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def pipeline_group(self, source: int, target: int) -> dist.ProcessGroup:
        """The group for messages from one stage to another."""
        assert self.pipeline_groups is not None
        return self.pipeline_groups[0 if source < target else 1]

    def gather_over_pipeline(self, value: Any) -> list[Any]:
        """Collects one small picklable value of each stage of this process's replica."""
        if self.pipeline_groups is None:
            return [value]
        values: list[Any] = [None] * self.pipeline_parallel_size
        with doing("pipeline gather"):
            dist.all_gather_object(values, value, group=self.pipeline_groups[0])
        return values

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            with doing("barrier"):
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


def join_process_group(parallel: ParallelConfig | None = None) -> ParallelMesh:
    """Joins the run: picks the device, initialises the process group, makes the groups of the axes.

    gloo, or nccl on GPUs. A run of one process makes a group of its own in memory, so that it needs
    no port and nothing can collide with it. Safe to call again in the same process: groups stay
    until the process ends, because DeepSpeed remembers them beyond the life of an engine.

    Args:
        parallel: sizes of the axes; None means that all processes are replicas.

    Returns:
        Ranks, groups and device of this process.

    Raises:
        InputError: the launcher's environment is incomplete, or the processes cannot be shared out.
    """
    parallel = parallel or ParallelConfig()
    launch = launch_environment()
    parallel.data_parallel_size(launch.world_size)
    device = choose_device(launch.local_rank)
    # DeepSpeed refuses to start without LOCAL_RANK, and guesses the accelerator without the other
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # the watch ends a process that waits too long, and says for whom; the backend's own
        # timeout, which names nobody, is only the backstop
        timeout = timedelta(seconds=1.5 * parallel.collective_timeout_seconds + 60.0)
        global _backstop  # groups do not inherit it
        _backstop = timeout
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _initialize(launch, backend, timeout, parallel.collective_timeout_seconds)
        atexit.register(leave_process_group)
    return make_mesh(launch, device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def make_mesh(
    launch: LaunchEnvironment, device: torch.device, tensor_size: int, pipeline_size: int
) -> ParallelMesh:
    """Makes the groups of each axis; collective, the process group must exist.

    Args:
        launch: rank and sizes of this process.
        device: where it computes.
        tensor_size: processes that share each layer.
        pipeline_size: stages.

    Returns:
        Ranks and groups of this process.
    """
    mesh = ParallelMesh(
        launch.rank, launch.world_size, launch.local_rank, device, tensor_size, pipeline_size
    )
    places = range(mesh.world_size)
    others = [
        ParallelMesh(rank, mesh.world_size, 0, device, tensor_size, pipeline_size)
        for rank in places
    ]
    same_layers = [
        other.rank
        for other in others
        if (other.pipeline_rank, other.data_parallel_rank)
        == (mesh.pipeline_rank, mesh.data_parallel_rank)
    ]
    same_part = [
        other.rank
        for other in others
        if (other.pipeline_rank, other.tensor_parallel_rank)
        == (mesh.pipeline_rank, mesh.tensor_parallel_rank)
    ]
    same_replica = [
        other.rank for other in others if other.data_parallel_rank == mesh.data_parallel_rank
    ]
    same_place = [mesh.rank_of_stage(stage) for stage in range(pipeline_size)]
    pipeline_groups = None
    if pipeline_size > 1:
        pipeline_groups = (_group(same_place, "forward"), _group(same_place, "backward"))
    return dataclasses.replace(
        mesh,
        tensor_parallel_group=_group(same_layers) if tensor_size > 1 else None,
        data_parallel_group=_group(same_part),
        model_parallel_group=_group(same_replica),
        pipeline_groups=pipeline_groups,
    )


_backstop: timedelta | None = None
"""Timeout of the groups; None leaves the back-end's own."""
_groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}


def _group(ranks: list[int], use: str = "collectives") -> dist.ProcessGroup:
    """A group of these ranks for one use, made once; only its members take part in making it."""
    key = (use, tuple(ranks))
    if key not in _groups:
        # torch names such a group after its ranks: a second one needs a description of its own
        with doing("making of a process group"):
            group = dist.new_group(
                ranks, timeout=_backstop, use_local_synchronization=True, group_desc=use
            )
        assert isinstance(group, dist.ProcessGroup)
        _groups[key] = group
    return _groups[key]


def _initialize(
    launch: LaunchEnvironment, backend: str, timeout: timedelta, collective_timeout: float
) -> None:
    if launch.world_size == 1:
        own = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=own, rank=0, world_size=1)
        return
    if not launch.master_address:
        raise InputError(
            f"environment: MASTER_ADDR is empty with {launch.world_size} processes; "
            "set it to the host of rank 0"
        )
    os.environ["MASTER_ADDR"] = launch.master_address
    os.environ["MASTER_PORT"] = str(launch.master_port)
    # torchrun keeps the store of a run in its agent, also when it starts the processes again
    by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = (launch.master_address, launch.master_port, attempt, by_rank_0, collective_timeout)
    store = open_store(launch.rank, *place)
    wait_for_all(store, launch.rank, launch.world_size, collective_timeout)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    board = open_store(-1, *place)  # a connection of its own: one that waits would hold the other
    start_watch(board, launch.rank, launch.world_size, collective_timeout, by_rank_0)


def abandon_process_group() -> None:
    """Lets a process that failed end at once: to leave in order would wait for the others."""
    stop_watch()  # a thread inside of the store at the end of the interpreter aborts the process
    atexit.unregister(leave_process_group)


def leave_process_group() -> None:
    """Leaves the process group at the end of the process."""
    stop_watch()
    if dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()
