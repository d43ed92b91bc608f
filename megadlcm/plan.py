"""What a run costs, before it starts and without torch: parameters, compute, memory, time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig
from megadlcm.config.accounting import (
    count_parameters,
    dense_control,
    flops_per_token,
    matmul_parameters_per_token,
)
from megadlcm.config.memory import MemoryEstimate, estimate_memory

TRAINING_PASSES = 3
"""Forward once, backward twice; repeated work of recomputation does not count."""
_GIB = 2.0**30


@dataclass(frozen=True)
class Hardware:
    """The machines of a run."""

    num_nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 1
    """Devices, and processes, of each node."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s; None means logging.peak_tflops."""
    model_flops_utilization: float = 0.4
    """Share of the peak that training is assumed to reach."""
    device_memory_gib: float | None = None
    """Memory of one device in GiB; None means that it is not checked."""

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    """What a run costs on some hardware."""

    name: str
    """Name of the run."""
    world_size: int
    """Processes."""
    data_parallel_size: int
    """Replicas."""
    gradient_accumulation_steps: int
    """Micro-batches of one replica in a step."""
    parameters: dict[str, int]
    """Parameters by part, and their total."""
    flops_per_token: dict[str, float]
    """Forward FLOPs of one token by part, and their total."""
    control_parameters: int
    """Parameters of the dense control."""
    control_flops_per_token: float
    """Forward FLOPs of one token of the dense control."""
    matmul_ratio: float
    """Matrix elements per token relative to the control: compute without attention maps."""
    memory: MemoryEstimate
    """Bytes of one process."""
    train_steps: int
    """Optimizer steps."""
    step_tokens: int
    """Tokens of one step."""
    training_flops: float
    """FLOPs of the whole run, three times forward."""
    seconds: float | None
    """Time of the whole run; None where the peak of the hardware is not known."""

    @property
    def train_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train_steps * self.step_tokens

    @property
    def flops_ratio(self) -> float:
        """Forward FLOPs per token relative to the control, with attention maps."""
        return self.flops_per_token["total"] / self.control_flops_per_token


def make_plan(config: RunConfig, hardware: Hardware) -> Plan:
    """Plans a run.

    Args:
        config: the run.
        hardware: the machines.

    Returns:
        Its cost.

    Raises:
        InputError: the run cannot work on these machines.
    """
    replicas = hardware.world_size
    accumulation = config.training.gradient_accumulation_steps(replicas)
    model, seq_len = config.model, config.data.seq_len
    control = dense_control(model)
    flops = flops_per_token(model, seq_len)
    matrices = matmul_parameters_per_token(model)["total"]
    training_flops = TRAINING_PASSES * flops["total"] * config.total_steps * config.step_tokens
    plan = Plan(
        name=config.name,
        world_size=hardware.world_size,
        data_parallel_size=replicas,
        gradient_accumulation_steps=accumulation,
        parameters=count_parameters(model),
        flops_per_token=flops,
        control_parameters=count_parameters(control)["total"],
        control_flops_per_token=flops_per_token(control, seq_len)["total"],
        matmul_ratio=matrices / matmul_parameters_per_token(control)["total"],
        memory=estimate_memory(config, replicas),
        train_steps=config.total_steps,
        step_tokens=config.step_tokens,
        training_flops=training_flops,
        seconds=_seconds(training_flops, config, hardware),
    )
    _check_memory(plan, hardware)
    return plan


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Spells a plan in plain values, for `--json`."""
    derived = {
        "train_tokens": plan.train_tokens,
        "flops_ratio": plan.flops_ratio,
        "memory_total": plan.memory.total,
        "memory_total_worst": plan.memory.total_worst,
    }
    return dataclasses.asdict(plan) | derived


def render_plan(plan: Plan) -> str:
    """Spells a plan as a table for a terminal."""
    return "\n".join([*_size_lines(plan), "", *_memory_lines(plan), "", *_time_lines(plan)])


def _seconds(training_flops: float, config: RunConfig, hardware: Hardware) -> float | None:
    peak = hardware.peak_tflops or config.logging.peak_tflops
    if peak is None:
        return None
    rate = peak * 1e12 * hardware.model_flops_utilization * hardware.world_size
    return training_flops / rate


def _check_memory(plan: Plan, hardware: Hardware) -> None:
    limit = hardware.device_memory_gib
    if limit is not None and plan.memory.total > limit * _GIB:
        raise InputError(
            f"one process needs {plan.memory.total / _GIB:.1f} GiB, must be <= --device-memory = "
            f"{limit:g} GiB; raise parallel.zero_stage, set parallel.recompute=block or lower "
            "training.micro_batch_size"
        )


def _size_lines(plan: Plan) -> list[str]:
    lines = [f"{plan.name}", "", f"{'part':22}{'parameters':>16}{'MFLOP/token':>14}{'share':>8}"]
    total = plan.flops_per_token["total"]
    for part, count in plan.parameters.items():
        flops = plan.flops_per_token.get(part, 0.0)
        lines.append(f"{part:22}{count:>16,}{flops / 1e6:>14,.1f}{flops / total:>8.1%}")
    control = plan.control_flops_per_token
    lines.append(f"{'dense control':22}{plan.control_parameters:>16,}{control / 1e6:>14,.1f}")
    lines.append(
        f"compute relative to the control: {plan.flops_ratio:.3f} "
        f"({plan.matmul_ratio:.3f} without attention maps)"
    )
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = (
        ("weights", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("total", memory.total),
        ("total, every token a concept", memory.total_worst),
    )
    head = f"memory of a process ({plan.data_parallel_size} data-parallel)"
    return [f"{head:38}{'GiB':>14}", *(f"{name:38}{size / _GIB:>14.2f}" for name, size in rows)]


def _time_lines(plan: Plan) -> list[str]:
    if plan.seconds is None:
        duration = "not known: give --peak-tflops or logging.peak_tflops"
    else:
        hours = plan.seconds / 3600
        duration = f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} hours"
    return [
        f"{'steps':20}{plan.train_steps:,} of {plan.step_tokens:,} tokens, "
        f"{plan.gradient_accumulation_steps} micro-batches per process",
        f"{'tokens':20}{plan.train_tokens:,}",
        f"{'training FLOPs':20}{plan.training_flops:.3e}",
        f"{'time':20}{duration}",
    ]
