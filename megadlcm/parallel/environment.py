"""What the launcher says about this process: rank, sizes, address; and its device.

The only file that reads or writes `os.environ`. Ranks come from torchrun (`RANK`, ...), from srun
(`SLURM_PROCID`, ...) or from whoever sets what torchrun would; a plain `megadlcm train` is a run of
one process and needs none of them. What is set must be right: nothing is guessed in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.errors import InputError

# torch reads some of the environment while it is loaded: it is not loaded here before it is used
if TYPE_CHECKING:
    import torch

DEFAULT_MASTER_PORT = 29400
_SLURM_PORTS = range(20_000, 29_000)
"""Below those that the system gives to connections."""
_ADDRESS = re.compile(r"[A-Za-z0-9._:%-]+")
_NODE_LIST = re.compile(r"((?:[^,\[\]]|\[[0-9][0-9,-]*\])+)(?:,.+)?")
"""Its first entry, up to a comma outside of brackets."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher says about this process."""

    rank: int = 0
    """Index of this process, 0 to world_size - 1."""
    world_size: int = 1
    """Processes of the run."""
    local_rank: int = 0
    """Index of this process on its node."""
    master_address: str = ""
    """Host of rank 0; empty for a run of one process."""
    master_port: int = 0
    """Port on which rank 0 listens."""
    start: str = ""
    """What the launcher calls this start of the run, in words; the same for all its processes."""
    is_store_of_launcher: bool = False
    """Whether the store of the run lives in the launcher, and not with rank 0."""
    is_child_of_launcher: bool = False
    """Whether the launcher is to outlive this process, and nobody else would end it: torchrun."""
    has_own_device: bool = False
    """Whether a single visible GPU is that of this process alone."""


def launch_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Reads rank and sizes from torchrun or srun.

    A batch script of Slurm also has `SLURM_PROCID` and `SLURM_NTASKS` in its environment although
    it is a single process; only a task of srun has `SLURM_STEP_NUM_TASKS`, so that one decides.

    Args:
        environ: the environment to read; None means this process's own.

    Returns:
        The environment of this process; one process where no launcher is seen.

    Raises:
        InputError: a launcher gave only part of what is needed, something impossible, or two of
            them contradict each other.
    """
    environ = os.environ if environ is None else environ
    is_given = "RANK" in environ and "WORLD_SIZE" in environ
    if "SLURM_STEP_NUM_TASKS" not in environ:
        is_task = False
    elif is_given and "TORCHELASTIC_RUN_ID" in environ:
        is_task = False  # torchrun runs inside of the task
    else:
        # whoever starts several processes by hand inside of a single task is not srun
        is_task = not (is_given and _number(environ, "SLURM_STEP_NUM_TASKS", least=1) == 1)
    if is_task:
        return _task_of_srun(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _process_of_torchrun(environ)
    return LaunchEnvironment()


def _process_of_torchrun(environ: Mapping[str, str]) -> LaunchEnvironment:
    """What torchrun says, or somebody in its words."""
    rank, world_size, local_rank = _ranks(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    return LaunchEnvironment(
        rank,
        world_size,
        local_rank,
        _address(environ, "MASTER_ADDR"),
        _port(environ, DEFAULT_MASTER_PORT),
        start="" if run_id is None else f"torchrun {run_id}",
        is_store_of_launcher=_flag(environ, "TORCHELASTIC_USE_AGENT_STORE"),
        is_child_of_launcher=run_id is not None,
    )


def _task_of_srun(environ: Mapping[str, str]) -> LaunchEnvironment:
    """What Slurm says about a task of srun."""
    keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = _ranks(environ, *keys)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        given = _ranks(environ, "RANK", "WORLD_SIZE")
        if given != (rank, world_size):
            # taken at their word, all tasks would be rank 0 of runs of their own in one folder
            raise InputError(
                f"environment: RANK = {given[0]} and WORLD_SIZE = {given[1]}, but srun says "
                f"SLURM_PROCID = {rank} and SLURM_STEP_NUM_TASKS = {world_size}, and it is not "
                "torchrun that runs in this task; unset RANK and WORLD_SIZE where srun or sbatch "
                "is called, or start with torchrun or srun alone"
            )
    job, step, restart = (
        _number(environ, key, default=0)
        for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    # two steps or jobs on a node must not meet on one port, and a start that found its port taken
    # shall find another one when it is requeued
    port = _SLURM_PORTS[(131 * job + 7 * restart + step) % len(_SLURM_PORTS)]
    nodes = "SLURM_STEP_NODELIST" if environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    return LaunchEnvironment(
        rank,
        world_size,
        local_rank,
        _address(environ, "MASTER_ADDR") or first_host(environ.get(nodes, ""), nodes),
        _port(environ, port),
        start=f"Slurm job {job}, step {step}, start {restart}",
        # each task has an environment of its own, into which Slurm writes its devices. Where the
        # node has too few for its tasks, several of them were given the same
        has_own_device=local_rank < _number(environ, "SLURM_GPUS_ON_NODE", default=world_size),
    )


def _ranks(environ: Mapping[str, str], *keys: str) -> tuple[int, ...]:
    """Rank, number of processes and what else is counted by them."""
    missing = [key for key in keys if key not in environ]
    if missing:
        given = next(key for key in keys if key in environ)
        raise InputError(
            f"environment: {', '.join(missing)} missing although {given} is set; "
            "start with torchrun or srun, or unset it for a run of one process",
        )
    size_key = keys[1]
    world_size = _number(environ, size_key, least=1)
    numbers = [world_size if key == size_key else _number(environ, key) for key in keys]
    for key, number in zip(keys, numbers, strict=True):
        if key != size_key and number >= world_size:
            raise InputError(
                f"environment: {key} = {number}, must be < {size_key} = {world_size}; "
                "start with torchrun or srun",
            )
    return tuple(numbers)


def _number(
    environ: Mapping[str, str],
    key: str,
    default: int | None = None,
    least: int = 0,
    most: int = 2**32,
) -> int:
    text = environ.get(key)
    if text is None and default is not None:
        return default
    # int() would also take signs, blanks, underscores and the digits of other scripts
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise InputError(
            f"environment: {key} = {text!r}, must be a whole number from {least} to {most}; "
            "start with torchrun or srun, or set it right",
        )
    return int(text)


def _port(environ: Mapping[str, str], default: int) -> int:
    return _number(environ, "MASTER_PORT", default, least=1, most=65535)


def _flag(environ: Mapping[str, str], key: str) -> bool:
    text = environ.get(key, "False")
    if text not in ("True", "False"):  # as torch writes and reads it
        raise InputError(
            f"environment: {key} = {text!r}, must be True or False; leave it to torchrun"
        )
    return text == "True"


def _address(environ: Mapping[str, str], key: str) -> str:
    text = environ.get(key, "")
    if text and not _ADDRESS.fullmatch(text):
        raise InputError(
            f"environment: {key} = {text!r}, must be a host name or an IP address; "
            "set it to the host of rank 0"
        )
    return text


def first_host(node_list: str, key: str = "SLURM_STEP_NODELIST") -> str:
    """First host of a Slurm node list: `rack[1-2]n[03-07],other` is `rack1n03`.

    Args:
        node_list: names with ranges in brackets, as Slurm writes them.
        key: the variable that holds it.

    Raises:
        InputError: that is no node list.
    """
    if not node_list:
        return ""
    listed = _NODE_LIST.fullmatch(node_list)
    # the first number of each pair of brackets, as it is written
    first = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", listed[1]) if listed else ""
    if not _ADDRESS.fullmatch(first):
        raise InputError(
            f"environment: {key} = {node_list!r}, must be a node list of Slurm such as "
            "node[03-07,9],other; set MASTER_ADDR to the host of rank 0"
        )
    return first


def quiet_torch() -> None:
    """Keeps the warnings of torch's C++ part from standard error, if torch is not loaded yet.

    Of a connection that is lost it writes 20 lines of frames at each attempt, whoever catches the
    error. Errors are still written, and who sets `TORCH_CPP_LOG_LEVEL` sees what that asks for.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def choose_device(launch: LaunchEnvironment) -> torch.device:
    """The GPU of this process; the CPU without a GPU, or where `DS_ACCELERATOR=cpu` asks for it.

    Args:
        launch: what the launcher says about this process.

    Raises:
        InputError: there is no GPU for it, or `DS_ACCELERATOR` asks for something else.
    """
    import torch

    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise InputError(
            f"environment: DS_ACCELERATOR = {accelerator!r}, must be cpu or cuda; "
            "unset it to take what is there"
        )
    if accelerator == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if accelerator == "cuda":
            raise InputError(
                "environment: DS_ACCELERATOR = 'cuda', but torch finds no CUDA device; "
                "unset it to compute on the CPU"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if launch.local_rank < visible:
        return torch.device("cuda", launch.local_rank)
    if visible == 1 and launch.has_own_device:
        return torch.device("cuda", 0)
    raise InputError(
        f"local rank {launch.local_rank}: GPUs visible here (CUDA_VISIBLE_DEVICES): {visible}; "
        "start one process for each GPU, let Slurm give each task one of its own "
        "(--gpus-per-task=1), or set DS_ACCELERATOR=cpu",
    )


def adopt_device(launch: LaunchEnvironment, device: torch.device) -> None:
    """Tells torch and DeepSpeed which device is this process's.

    Args:
        launch: what the launcher says about this process.
        device: its device.
    """
    import torch

    # DeepSpeed refuses to start without LOCAL_RANK, which it takes for the number of the device,
    # and guesses the accelerator without the other
    os.environ["LOCAL_RANK"] = str(launch.local_rank if device.index is None else device.index)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)


def announce_address(launch: LaunchEnvironment) -> None:
    """Tells libraries that read the environment where rank 0 listens."""
    os.environ["MASTER_ADDR"] = launch.master_address
    os.environ["MASTER_PORT"] = str(launch.master_port)
