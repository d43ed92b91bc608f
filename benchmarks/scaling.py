"""How fast layouts of one, two and four processes are on this machine, and what they send.

    python -m benchmarks.scaling configs/quickstart.yaml --output benchmarks/results/scaling.json

Processes of one machine share its cores, so a ratio of speeds says what a layout costs in waiting
and communication, not how a cluster would scale. Ratios are within one run of this command; bytes
between stages are counted, the rest is the plan's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megadlcm.config import RunConfig, load_config
from megadlcm.engine.engine import build_engine
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import TrainStep
from megadlcm.parallel.partition import build_stage_model
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.layout import Hardware, plan_layout
from megadlcm.training.replica_loader import open_loader

# tensor, pipeline, placement, sequence_parallel, for each number of processes
LAYOUTS: dict[int, list[tuple[int, int, str, bool]]] = {
    1: [(1, 1, "linear", False)],
    2: [
        (1, 1, "linear", False),
        (2, 1, "linear", False),
        (2, 1, "linear", True),
        (1, 2, "linear", False),
        (1, 2, "folded", False),
    ],
    4: [
        (1, 1, "linear", False),
        (4, 1, "linear", True),
        (1, 4, "linear", False),
        (1, 4, "folded", False),
        (2, 2, "linear", True),
        (2, 1, "linear", False),
        (1, 2, "linear", False),
    ],
}
_STEPS = 3


def with_layout(config: RunConfig, layout: tuple[int, int, str, bool]) -> RunConfig:
    """The same run on a layout; without evaluation."""
    tensor, pipeline, placement, sequence = layout
    parallel = dataclasses.replace(
        config.parallel,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        pipeline_placement=placement,  # type: ignore[arg-type]
        sequence_parallel=sequence,
    )
    training = dataclasses.replace(config.training, micro_batch_size=1)
    return dataclasses.replace(config, parallel=parallel, training=training)


def measure(config: RunConfig) -> dict[str, Any]:
    """Seconds of a step and bytes that this process sent between stages in it."""
    mesh = join_process_group(config.parallel)
    engine = build_engine(build_stage_model(config, mesh), config, mesh)
    step, state = TrainStep(engine, config), TrainState()
    loader = open_loader(config, mesh)
    seconds = []
    for _ in range(1 + _STEPS):
        batch = next(loader)
        mesh.barrier()
        start = time.perf_counter()
        result = step.run(batch, state)
        mesh.barrier()
        seconds.append(time.perf_counter() - start)
        state.step += 1
    loader.close()
    sent = sum(engine.pipeline.traffic.sent.values()) / len(seconds)
    everyone = mesh.gather_over_run(sent)
    return {
        "seconds": statistics.median(seconds[1:]),
        "loss": result.summary.loss,
        "sent_between_stages": sum(everyone),
        "sent_by_busiest": max(everyone),
    }


def worker(path: str, overrides: list[str], output: Path) -> None:
    """What each process of a launch does: every layout of its number of processes."""
    config = load_config(path, overrides)
    world_size = int(os.environ["WORLD_SIZE"])  # a launcher started this file
    rows = []
    for layout in LAYOUTS[world_size]:
        run = with_layout(config, layout)
        plan = plan_layout(run, Hardware(gpus_per_node=world_size))
        tensor, pipeline, placement, sequence = layout
        rows.append(
            {
                "processes": world_size,
                "tensor": tensor,
                "pipeline": pipeline,
                "data": world_size // (tensor * pipeline),
                "placement": placement if pipeline > 1 else "-",
                "sequence_parallel": sequence,
                "planned_bubble": plan.bubble,
                "heaviest_over_mean": plan.imbalance,
                "planned_tensor_bytes": plan.traffic.tensor,
                "planned_data_bytes": plan.traffic.data,
            }
            | measure(run)
        )
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps(rows), encoding="utf-8")


def launch(world_size: int, path: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Runs the layouts of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}", "--standalone"]
        words = ["-m", "benchmarks.scaling", path, *overrides, "--worker", str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, *command, *words], check=True, env=environment)
        rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown; speed relative to one process."""
    lines = [
        "| processes | tensor x pipeline x data | placement | rows cut | speed | bubble, planned "
        "| heaviest / mean | MB between stages | MB in layers, planned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['processes']} | {row['tensor']} x {row['pipeline']} x {row['data']} "
            f"| {row['placement']} | {'yes' if row['sequence_parallel'] else 'no'} "
            f"| {rows[0]['seconds'] / row['seconds']:.2f} | {row['planned_bubble']:.1%} "
            f"| {row['heaviest_over_mean']:.3f} | {row['sent_between_stages'] / 1e6:.1f} "
            f"| {row['planned_tensor_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and keeps the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker is not None:
        worker(arguments.config, arguments.overrides, arguments.worker)
        return
    rows = [row for size in LAYOUTS for row in launch(size, arguments.config, arguments.overrides)]
    for row in rows:
        assert abs(row["loss"] / rows[0]["loss"] - 1) < 1e-5, row
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
