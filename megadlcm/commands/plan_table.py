"""A plan, and a ranking of layouts, as tables for a terminal."""

from __future__ import annotations

from megadlcm.plan.report import Plan
from megadlcm.plan.search import Ranking

_GIB = 2.0**30


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


def render_ranking(ranking: Ranking, count: int) -> str:
    """Spells the first layouts of a ranking as a table for a terminal."""
    lines = [f"{'step s':>8}{'MFU':>7}{'GiB':>8}{'worst':>8}{'bubble':>8}{'heaviest':>9}  layout"]
    for layout in ranking.layouts[:count]:
        plan = layout.plan
        lines.append(
            f"{layout.step_seconds:>8.3f}{layout.utilization:>7.1%}{plan.memory.total / _GIB:>8.1f}"
            f"{plan.worst_bytes / _GIB:>8.1f}{plan.bubble:>8.1%}{plan.imbalance:>9.3f}"
            f"  {layout.description}"
        )
    lines.append("")
    lines.append(f"{len(ranking.layouts)} layouts fit, at {ranking.peak_tflops:g} TFLOP/s a device")
    lines += [f"{count} do not: {reason}" for reason, count in ranking.refused.items()]
    return "\n".join(lines)
