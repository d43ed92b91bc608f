"""What a run costs, before it starts and without torch: parameters, compute, memory, time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megadlcm.config import RunConfig
from megadlcm.config.accounting import (
    count_parameters,
    dense_control,
    flops_per_token,
    matmul_parameters_per_token,
)
from megadlcm.parallel.memory import MemoryEstimate
from megadlcm.plan_layout import (
    TRAINING_PASSES,
    Hardware,
    LayoutPlan,
    describe_layout,
    plan_layout,
    projected_utilization,
)
from megadlcm.plan_search import Ranking, check_device_memory

__all__ = ["Hardware", "Plan", "make_plan", "plan_to_dict", "ranking_to_dict", "render_plan"]

_GIB = 2.0**30


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
    layout = plan_layout(config, hardware)
    check_device_memory(layout.memory.total, hardware)
    model, seq_len = config.model, config.data.seq_len
    control = dense_control(model)
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
    for stage, spelled in zip(layout.stages, values["stages"], strict=True):
        spelled["memory_total"] = stage.memory.total
        spelled["memory_total_worst"] = stage.memory.total_worst
    memory = layout.memory
    totals = {"memory_total": memory.total, "memory_total_worst": layout.worst_bytes}
    return values | {"step_seconds": layout.step_seconds} | totals


def render_plan(plan: Plan) -> str:
    """Spells a plan as a table for a terminal."""
    parts = [_size_lines(plan), _layout_lines(plan), _memory_lines(plan), _time_lines(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts)


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


def _layout_lines(plan: Plan) -> list[str]:
    """Stages and what crosses between them; a short form for one stage."""
    layout, lines = plan.layout, [plan.layout_name]
    if len(layout.stages) > 1:
        head = f"{'stage':6}{'FLOPs':>7}{'parameters':>15}{'in flight':>11}{'GiB':>9}{'worst':>9}"
        lines.append(f"{head}  units")
        for stage in layout.stages:
            lines.append(
                f"{stage.stage:<6}{stage.flops_share:>7.1%}{stage.parameters:>15,}"
                f"{' + '.join(map(str, stage.in_flight)):>11}{stage.memory.total / _GIB:>9.2f}"
                f"{stage.memory.total_worst / _GIB:>9.2f}  {', '.join(stage.units)}"
            )
        lines.append(
            f"heaviest stage {layout.imbalance:.3f} of the mean; {layout.bubble:.1%} of the time "
            "waiting for other stages"
        )
    traffic = layout.traffic
    lines.append(
        f"GiB sent by a process in a step: {traffic.tensor / _GIB:.3f} inside layers, "
        f"{traffic.pipeline / _GIB:.3f} between stages, {traffic.data / _GIB:.3f} between replicas"
    )
    if len(layout.stages) > 1:
        folded = traffic.pipeline_folded
        lines.append(
            f"GiB between all stages of a replica: {traffic.pipeline_total / _GIB:.3f}; linear "
            f"{traffic.pipeline_straight / _GIB:.3f}, with token states riding along "
            f"{traffic.pipeline_riding / _GIB:.3f}, folded "
            + ("not possible" if folded is None else f"{folded / _GIB:.3f}")
        )
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = (
        ("weights", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("buffers", memory.buffers),
        ("activations", memory.activations),
        ("total", memory.total),
        ("total, every token a concept", plan.layout.worst_bytes),
    )
    head = "memory of the fullest process"
    return [f"{head:38}{'GiB':>14}", *(f"{name:38}{size / _GIB:>14.2f}" for name, size in rows)]


def _time_lines(plan: Plan) -> list[str]:
    layout, step = plan.layout, plan.layout.step_seconds
    if plan.seconds is None or step is None or plan.utilization is None:
        times = [f"{'time':20}not known: give --peak-tflops or logging.peak_tflops"]
    else:
        hours = plan.seconds / 3600
        duration = f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} hours"
        times = [
            f"{'time of a step':20}{step:.3f} s: {layout.compute_seconds:.3f} computation with "
            f"waiting, {layout.counting_seconds:.3f} counting boundaries first,",
            f"{'':20}{layout.tensor_seconds:.3f} inside layers, {layout.pipeline_seconds:.3f} "
            f"between stages, {layout.data_seconds:.3f} between replicas",
            f"{'MFU':20}{plan.utilization:.1%}",
            f"{'time':20}{duration}",
        ]
    return [
        f"{'steps':20}{plan.train_steps:,} of {plan.step_tokens:,} tokens, "
        f"{plan.gradient_accumulation_steps} micro-batches per process",
        f"{'tokens':20}{plan.train_tokens:,}",
        f"{'training FLOPs':20}{plan.training_flops:.3e}",
        *times,
    ]
