"""A plan, and a ranking of layouts, as tables for a terminal."""

from __future__ import annotations

from data_pipeline.tables import render_table
from megadlcm.config.constants import GIB
from megadlcm.plan.report import Plan
from megadlcm.plan.search import Ranking


def render_plan(plan: Plan) -> str:
    """Spells a plan as tables."""
    parts = [plan.name, _parts_table(plan), _layout_lines(plan), _memory_table(plan)]
    return "\n\n".join([*parts, _checkpoint_table(plan), _time_table(plan)])


def render_ranking(ranking: Ranking, count: int) -> str:
    """Spells the first layouts of a ranking as a table."""
    rows = [
        (
            f"{layout.step_seconds:.3f}",
            f"{layout.utilization:.1%}",
            f"{layout.plan.memory.total / GIB:.1f}",
            f"{layout.plan.worst_bytes / GIB:.1f}",
            f"{layout.plan.bubble:.1%}",
            f"{layout.plan.imbalance:.3f}",
            layout.description,
        )
        for layout in ranking.layouts[:count]
    ]
    header = ("step s", "MFU", "GiB", "worst", "bubble", "heaviest", "layout")
    lines = [f"{len(ranking.layouts)} layouts fit, at {ranking.peak_tflops:g} TFLOP/s a device"]
    lines += [f"{count} do not: {reason}" for reason, count in ranking.refused.items()]
    return "\n".join([render_table(header, rows, left=(6,)), "", *lines])


def _parts_table(plan: Plan) -> str:
    # an embedding has parameters and no products
    total = plan.flops_per_token["total"]
    rows = []
    for part, count in plan.parameters.items():
        flops = plan.flops_per_token.get(part, 0.0)
        rows.append((part, f"{count:,}", f"{flops / 1e6:,.1f}", f"{flops / total:.1%}"))
    control = plan.control_flops_per_token
    rows.append(("dense control", f"{plan.control_parameters:,}", f"{control / 1e6:,.1f}", ""))
    table = render_table(("part", "parameters", "MFLOP/token", "share"), rows)
    return (
        f"{table}\ncompute relative to the control: {plan.flops_ratio:.3f} "
        f"({plan.matmul_ratio:.3f} without attention maps)"
    )


def _layout_lines(plan: Plan) -> str:
    """Stages and what crosses between them; a short form for one stage."""
    layout, lines = plan.layout, [plan.layout_name]
    if len(layout.stages) > 1:
        lines.append(_stage_table(plan))
        lines.append(
            f"heaviest stage {layout.imbalance:.3f} of the mean; {layout.bubble:.1%} of the time "
            "waiting for other stages"
        )
    traffic = layout.traffic
    lines.append(
        f"GiB sent by a process in a step: {traffic.tensor / GIB:.3f} inside layers, "
        f"{traffic.pipeline / GIB:.3f} between stages, {traffic.data / GIB:.3f} between replicas"
    )
    # what the other placements would send, for the same number of stages
    if len(layout.stages) > 1:
        folded = traffic.pipeline_folded
        lines.append(
            f"GiB between all stages of a replica: {traffic.pipeline_total / GIB:.3f}; linear "
            f"{traffic.pipeline_straight / GIB:.3f}, with token states riding along "
            f"{traffic.pipeline_riding / GIB:.3f}, folded "
            + ("not possible" if folded is None else f"{folded / GIB:.3f}")
        )
    return "\n".join(lines)


def _stage_table(plan: Plan) -> str:
    header = ("stage", "FLOPs", "parameters", "in flight", "GiB", "worst", "units")
    rows = [
        (
            f"{stage.stage}",
            f"{stage.flops_share:.1%}",
            f"{stage.parameters:,}",
            " + ".join(map(str, stage.in_flight)),
            f"{stage.memory.total / GIB:.2f}",
            f"{stage.memory.total_worst / GIB:.2f}",
            ", ".join(stage.units),
        )
        for stage in plan.layout.stages
    ]
    return render_table(header, rows, left=(0, 6))


def _memory_table(plan: Plan) -> str:
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
    header = ("memory of the fullest process", "GiB")
    return render_table(header, [(name, f"{size / GIB:.2f}") for name, size in rows])


def _checkpoint_table(plan: Plan) -> str:
    saves = plan.checkpoints
    rows = [
        ("in all", f"{saves.total_bytes / GIB:.2f} GiB"),
        (
            "of a process, at most",
            f"{saves.process_bytes / GIB:.3f} GiB, {saves.imbalance:.2f} of the mean",
        ),
        ("copies on a node (checkpoint.async)", f"{saves.staging_node_bytes / GIB:.2f} GiB"),
        (
            "a save",
            f"{saves.save_seconds:,.1f} s, for {saves.stall_seconds:,.1f} of which training waits",
        ),
    ]
    if saves.interval_seconds is not None and saves.loss_seconds is not None:
        steps = "" if saves.interval_steps is None else f", {saves.interval_steps:,} steps"
        rows.append(("best interval", f"{saves.interval_seconds:,.0f} s{steps}"))
        rows.append(("lost in a failure", f"{saves.loss_seconds:,.0f} s and a restart"))
    return render_table(("checkpoint", ""), rows, left=(0, 1))


def _time_table(plan: Plan) -> str:
    rows = [
        (
            "steps",
            f"{plan.train_steps:,} of {plan.step_tokens:,} tokens, "
            f"{plan.gradient_accumulation_steps} micro-batches per process",
        ),
        ("tokens", f"{plan.train_tokens:,}"),
        ("training FLOPs", f"{plan.training_flops:.3e}"),
        *_time_rows(plan),
    ]
    return render_table((), rows, left=(0, 1))


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
    layout, step = plan.layout, plan.layout.step_seconds
    # without a peak there is no guess: a wrong one would look like a promise
    if plan.seconds is None or step is None or plan.utilization is None:
        return [("time", "not known: give --peak-tflops or logging.peak_tflops")]
    hours = plan.seconds / 3600
    return [
        (
            "time of a step",
            f"{step:.3f} s: {layout.compute_seconds:.3f} computation with waiting, "
            f"{layout.counting_seconds:.3f} counting boundaries first,",
        ),
        (
            "",
            f"{layout.tensor_seconds:.3f} inside layers, {layout.pipeline_seconds:.3f} between "
            f"stages, {layout.data_seconds:.3f} between replicas",
        ),
        ("MFU", f"{plan.utilization:.1%}"),
        ("time", f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} hours"),
    ]
