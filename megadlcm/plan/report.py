"""What a run costs, before it starts and without torch: parameters, compute, memory, time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megadlcm.config import RunConfig
from megadlcm.plan.accounting import (
    TRAINING_PASSES,
    count_parameters,
    dense_control,
    flops_per_token,
    matmul_parameters_per_token,
)
from megadlcm.plan.checkpoints import CheckpointPlan, plan_checkpoints
from megadlcm.plan.layout import (
    Hardware,
    LayoutPlan,
    describe_layout,
    plan_layout,
    projected_utilization,
)
from megadlcm.plan.memory import MemoryEstimate
from megadlcm.plan.search import Ranking, check_device_memory


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
    layout_name: str
    """Sizes of the axes and how they are used."""
    layout: LayoutPlan
    """Stages, bubble, communication and time of a step."""
    memory: MemoryEstimate
    """Bytes of the fullest process."""
    checkpoints: CheckpointPlan
    """What checkpoints weigh, and how often they are best written."""
    train_steps: int
    """Optimizer steps."""
    step_tokens: int
    """Tokens of one step."""
    training_flops: float
    """FLOPs of the whole run, three times forward."""
    seconds: float | None
    """Time of the whole run; None where the peak of the hardware is not known."""
    utilization: float | None
    """Share of the peak that the run reaches, waiting and communication included."""

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
    # refusals first, so that a run that cannot work costs no more than its reason
    layout = plan_layout(config, hardware)
    check_device_memory(layout.memory.total, hardware)
    model, seq_len = config.model, config.data.seq_len
    control = dense_control(model)  # of a dense model itself
    flops = flops_per_token(model, seq_len)
    matrices = matmul_parameters_per_token(model)["total"]
    step = layout.step_seconds
    return Plan(
        name=config.name,
        world_size=hardware.world_size,
        data_parallel_size=layout.data_parallel_size,
        gradient_accumulation_steps=layout.micro_batches,
        parameters=count_parameters(model),
        flops_per_token=flops,
        control_parameters=count_parameters(control)["total"],
        control_flops_per_token=flops_per_token(control, seq_len)["total"],
        matmul_ratio=matrices / matmul_parameters_per_token(control)["total"],
        layout_name=describe_layout(config, layout.data_parallel_size),
        layout=layout,
        memory=layout.memory,
        checkpoints=plan_checkpoints(config, hardware, layout.stages, step),
        train_steps=config.total_steps,
        step_tokens=config.step_tokens,
        training_flops=TRAINING_PASSES * flops["total"] * config.total_steps * config.step_tokens,
        seconds=None if step is None else step * config.total_steps,
        utilization=None if step is None else projected_utilization(config, hardware, step),
    )


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Spells a plan in plain values, for `--json`."""
    derived = {
        "train_tokens": plan.train_tokens,
        "flops_ratio": plan.flops_ratio,
        "memory_total": plan.memory.total,
        "memory_total_worst": plan.layout.worst_bytes,
    }
    return dataclasses.asdict(plan) | derived | {"layout": _layout_to_dict(plan.layout)}


def ranking_to_dict(ranking: Ranking, count: int) -> dict[str, Any]:
    """Spells the first layouts of a ranking in plain values, for `--json`."""
    # the whole plan of each, so that a script can choose by what it likes
    layouts = [
        dataclasses.asdict(layout) | {"plan": _layout_to_dict(layout.plan)}
        for layout in ranking.layouts[:count]
    ]
    return {
        "layouts": layouts,
        "layouts_that_fit": len(ranking.layouts),
        "layouts_refused": ranking.refused,
        "layouts_peak_tflops": ranking.peak_tflops,
    }


def _layout_to_dict(layout: LayoutPlan) -> dict[str, Any]:
    values = dataclasses.asdict(layout)
    # properties are no fields, so `asdict` leaves these out
    for stage, spelled in zip(layout.stages, values["stages"], strict=True):
        spelled["memory_total"] = stage.memory.total
        spelled["memory_total_worst"] = stage.memory.total_worst
    memory = layout.memory
    totals = {"memory_total": memory.total, "memory_total_worst": layout.worst_bytes}
    return values | {"step_seconds": layout.step_seconds} | totals
