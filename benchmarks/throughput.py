"""Speed as ratios within one run: DLCM over dense, and the training loop over a bare torch loop.

    python -m benchmarks.throughput CONFIG [key=value ...] [--rounds N] [--steps N]

Three loops train on the same batches, a few steps each, round after round; the medians of the
round-by-round ratios are printed, so a machine that slows down slows down all three.

- dlcm: a bare loop (forward, loss, backward, clip, fused AdamW) around the config's model;
- dense: the same loop around the dense control with equal forward FLOPs per token;
- trainer: the real loop (DeepSpeed engine, data loader, metrics, TensorBoard) around the model.

Equal FLOPs hold at the target compression only, so rates are small and constant, the loops run
until the ratio has settled, and a measurement at another compression is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.equal_flops import dense_with_equal_flops
from data_pipeline.reading.batch import StepBatch
from data_pipeline.reading.loader import StepLoader
from megadlcm.config import RunConfig, load_config
from megadlcm.engine.objective import Objective, StepSummary, StepTotals
from megadlcm.engine.optimizer import build_optimizer
from megadlcm.engine.ratio_control import RatioController
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import to_device
from megadlcm.model import DLCM, LanguageModel, build_model
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.accounting import flops_per_token
from megadlcm.run_folder.rows import read_rows
from megadlcm.training.pretrain import open_trainer
from megadlcm.training.trainer import Trainer

_SETTLING_STEPS = 40
_TOLERANCE = 0.03
"""Largest relative distance of a loop's compression from its target."""


class BareLoop:
    """What a researcher would write: nothing but the arithmetic of a step.

    Args:
        config: the run; its micro-batch is the whole global batch.
        mesh: the one process.
        calibration_offset: the detector's offset, as the trainer's calibration sets it.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh, calibration_offset: float) -> None:
        self.config, self.device = config, mesh.device
        self.model: LanguageModel = build_model(config.model, config.mup, seed=config.seed)
        self.model.set_recompute(config.parallel.recompute)
        self.model.to(self.device)
        if isinstance(self.model, DLCM):
            self.model.boundary_detector.offset.fill_(calibration_offset)
        self.objective = Objective(config, mesh)
        self.controller = RatioController(config)
        self.optimizer = build_optimizer(self.model, config)
        self.state = TrainState()
        self.tokens = self.concepts = 0.0

    def run(self, step_batch: StepBatch) -> StepSummary:
        """Trains on one global batch and returns its sums."""
        config, state = self.config, self.state
        batch = to_device(step_batch.micro_batches[0], config, state.step, self.device)
        half = config.training.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            output = self.model(batch.tokens_T, batch.cu_seqlens, batch.sampling)
        totals = StepTotals(batch.tokens_T.numel(), None)
        loss, stats = self.objective(output, batch.labels_T, totals)
        if output.boundary is not None:
            ratio = self.objective.ratio_loss(output.boundary, output.packing, totals)
            loss = loss if ratio is None else loss + ratio
        loss.backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
        summary = StepSummary.from_sums(stats.sums.tolist())
        for group in self.optimizer.param_groups:
            if group["steered"]:
                self._steer(group, summary, stats.prob_histogram, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        self.tokens += summary.num_tokens
        self.concepts += summary.num_boundaries
        return summary

    def _steer(
        self, group: dict[str, Any], summary: StepSummary, histogram: Any, norm: float
    ) -> None:
        clipped = torch.stack(torch._foreach_norm([p.grad for p in group["params"]])).norm()
        shortened = min(1.0, self.config.training.max_grad_norm / norm)
        step_size = self.controller.step_size(
            summary.boundary_fraction, histogram.cpu(), float(clipped) / shortened, self.state
        )
        group["lr"] = self.controller.adamw_rate(step_size, norm)


def measure(config: RunConfig, rounds: int, steps: int) -> dict[str, object]:
    """Times the three loops in turn.

    Args:
        config: a run on one process, its micro-batch the whole global batch.
        rounds: repetitions of the three.
        steps: steps of each in a round.

    Returns:
        Median ratios, their range, and what was compared.
    """
    mesh = join_process_group()
    if mesh.world_size != 1:
        raise SystemExit("the benchmark runs in one process")
    dense_model = dense_with_equal_flops(config.model, config.data.seq_len)
    dense_config = dataclasses.replace(config, model=dense_model)
    with tempfile.TemporaryDirectory() as folder:
        trainer_config = dataclasses.replace(config, output_dir=folder)
        with open_trainer(trainer_config, mesh) as trainer, _batches(config) as loader:
            trainer.train_one()  # calibrates
            first = next(loader)
            assert isinstance(trainer.engine.model, DLCM)
            offset = float(trainer.engine.model.boundary_detector.offset)
            loops = {
                "dlcm": BareLoop(config, mesh, offset),
                "dense": BareLoop(dense_config, mesh, 0.0),
            }
            for loop in loops.values():
                loop.run(first)
            _round(trainer, loops, loader, _SETTLING_STEPS)
            concepts = _TrainerConcepts(trainer)
            loops["dlcm"].tokens = loops["dlcm"].concepts = 0.0
            timed = [_round(trainer, loops, loader, steps) for _ in range(rounds)]
            realised = {
                "dlcm": loops["dlcm"].tokens / loops["dlcm"].concepts,
                "trainer": concepts.ratio(),
            }
            tokens = loops["dlcm"].tokens / rounds
    seconds = {name: [entry[name] for entry in timed] for name in timed[0]}
    return _report(config, dense_config, seconds, realised, tokens) | {
        "rounds": rounds,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "device": mesh.device.type,
    }


class _TrainerConcepts:
    """Realised compression of the trainer's steps from here on, from its metrics file."""

    def __init__(self, trainer: Trainer) -> None:
        self._folder = Path(trainer.config.output_dir)
        self._skip = len(read_rows(self._folder))

    def ratio(self) -> float:
        rows = read_rows(self._folder)[self._skip :]
        return statistics.harmonic_mean(row["tokens_per_concept"] for row in rows)


def _round(
    trainer: Trainer, loops: dict[str, BareLoop], loader: StepLoader, steps: int
) -> dict[str, float]:
    """Trains each loop on the same batches; seconds of each."""
    batches = [next(loader) for _ in range(steps)]
    seconds = {}
    for name, loop in loops.items():
        start = _now(loop.device)
        for batch in batches:
            loop.run(batch)
        seconds[name] = _now(loop.device) - start
    assert trainer.state.consumed_samples == batches[0].first_sample
    start = _now(trainer.engine.mesh.device)
    for _ in batches:
        trainer.train_one()
    seconds["trainer"] = _now(trainer.engine.mesh.device) - start
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _batches(config: RunConfig) -> Iterator[StepLoader]:
    loader = StepLoader(
        config.data,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
    )
    try:
        yield loader
    finally:
        loader.close()


def _report(
    config: RunConfig,
    dense: RunConfig,
    seconds: dict[str, list[float]],
    realised: dict[str, float],
    tokens: float,
) -> dict[str, object]:
    target = config.model.target_tokens_per_concept
    for name, ratio in realised.items():
        if abs(ratio / target - 1) > _TOLERANCE:
            raise SystemExit(
                f"{name}: {ratio:.2f} tokens per concept, target {target:g}: not comparable; "
                "raise --steps or the batch"
            )
    length = config.data.seq_len
    flops = [
        flops_per_token(config.model, length, realised["dlcm"])["total"],
        flops_per_token(dense.model, length)["total"],
    ]
    return {
        "dlcm_over_dense": _ratio(seconds["dense"], seconds["dlcm"]),
        "trainer_over_bare": _ratio(seconds["dlcm"], seconds["trainer"]),
        "tokens_per_concept": realised,
        "flops_per_token_dlcm_over_dense": flops[0] / flops[1],
        "tokens_per_second": {
            name: tokens / statistics.median(values) for name, values in seconds.items()
        },
        "model": dataclasses.asdict(config.model),
        "dense": dataclasses.asdict(dense.model),
    }


def _ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    ratios = [top / bottom for top, bottom in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    """Measures, prints JSON and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    results = Path(__file__).parent / "results" / "throughput.json"
    parser.add_argument("--output", type=Path, default=results, help="default: %(default)s")
    arguments = parser.parse_args()
    given = load_config(arguments.config, arguments.overrides)
    length = _SETTLING_STEPS + 2 + arguments.rounds * arguments.steps
    fixed = (
        f"training.micro_batch_size={given.training.global_batch_size}",
        f"training.train_steps={length}",
        "optimizer.learning_rate=1e-4",
        "schedule.warmup_steps=0",
        "schedule.decay_fraction=0",
    )
    config = load_config(arguments.config, [*arguments.overrides, *fixed])
    result = measure(config, arguments.rounds, arguments.steps)
    words = ["python", "-m", "benchmarks.throughput", str(arguments.config), *arguments.overrides]
    text = json.dumps({"command": shlex.join(words)} | result, indent=1)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
