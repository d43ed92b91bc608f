"""Joining and leaving the process group of a run."""

from __future__ import annotations

import atexit
import signal
import threading
from datetime import timedelta

import torch.distributed as dist

from data_pipeline.errors import InputError
from megadlcm.config import ParallelConfig
from megadlcm.parallel.environment import (
    LaunchEnvironment,
    adopt_device,
    announce_address,
    choose_device,
    launch_environment,
)
from megadlcm.parallel.groups import forget_groups, make_mesh
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.rendezvous import (
    RendezvousError,
    find_launcher,
    meet,
    without_stack_traces,
)
from megadlcm.parallel.watch.activity import THIS_PROCESS, doing
from megadlcm.parallel.watch.watchdog import first_line, report_failure, start_watch, stop_watch


def join_process_group(parallel: ParallelConfig | None = None, name: str = "run") -> ParallelMesh:
    """Joins the run: picks the device, initialises the process group, makes the groups of the axes.

    gloo, or nccl on GPUs. Safe to call again in the same process: groups stay until the process
    ends, because DeepSpeed remembers them beyond the life of an engine.

    Args:
        parallel: sizes of the axes; None means that all processes are replicas.
        name: of the run, the same for all its processes.

    Returns:
        Ranks, groups and device of this process.

    Raises:
        InputError: the launcher's environment is incomplete, or the processes cannot be shared out.
        RendezvousError: the processes did not find each other.
    """
    parallel = parallel or ParallelConfig()
    launch = launch_environment()
    parallel.data_parallel_size(launch.world_size)
    device = choose_device(launch)
    adopt_device(launch, device)
    # the watch ends a process that waits too long, and says for whom; the backend's own timeout,
    # which names nobody, is only the backstop
    backstop = timedelta(seconds=1.5 * parallel.collective_timeout_seconds + 60.0)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        atexit.register(leave_process_group)
        _initialize(launch, name, backend, backstop, parallel.collective_timeout_seconds)
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return make_mesh(launch, device, *sizes, backstop)


def _initialize(
    launch: LaunchEnvironment, name: str, backend: str, timeout: timedelta, patience: float
) -> None:
    if launch.world_size == 1:
        # in memory: needs no port, so that nothing can collide with it
        own = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=own, rank=0, world_size=1)
        if launch.is_child_of_launcher:  # only for the launcher's end, which leaves an orphan
            start_watch(own, 0, 1, patience, False, True)
        if launch.is_store_of_launcher:
            try:  # after the watch knows the parent: from then on it would see it end
                find_launcher(launch, name, patience)
            except RendezvousError:
                abandon_process_group()
                raise
        return
    if not launch.master_address:
        raise InputError(
            f"environment: MASTER_ADDR is empty with {launch.world_size} processes; "
            "set it to the host of rank 0",
        )
    announce_address(launch)
    # before torch does, whose own error names nobody
    with without_stack_traces():
        store, board = meet(launch, name, patience)
    rank, world_size = launch.rank, launch.world_size
    is_hosted_by_rank_0 = not launch.is_store_of_launcher
    is_child = launch.is_child_of_launcher
    start_watch(board, rank, world_size, patience, is_hosted_by_rank_0, is_child)
    try:
        with doing("start of the process group"):
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
    except RuntimeError as error:
        text = report_failure(error) or first_line(error)
        abandon_process_group()
        raise RendezvousError(text) from error


def abandon_process_group() -> None:
    """Lets a process that failed end at once: to leave in order would wait for the others."""
    stop_watch()  # a thread inside of the store at the end of the interpreter aborts the process
    atexit.unregister(leave_process_group)
    # it is about to say why a collective broke: a launcher that asks now has not long to wait
    is_main = threading.current_thread() is threading.main_thread()
    if THIS_PROCESS.broke_in is not None and is_main:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave_process_group() -> None:
    """Leaves the process group at the end of the process."""
    stop_watch()
    if dist.is_initialized():
        forget_groups()
        dist.destroy_process_group()
