"""Speed as ratios within one run: DLCM over dense, and the training loop over a bare torch loop.

    python -m benchmarks.throughput CONFIG [key=value ...] [--rounds N] [--steps N]

The three are timed in turn, a few steps each, round after round on the same samples, and the
medians of the round-by-round ratios are printed: a machine that slows down slows down all three.

- dlcm: a bare loop (forward, loss, backward, clip, fused AdamW) around the config's model;
- dense: the same loop around the dense control with equal forward FLOPs per token;
- trainer: the real loop (DeepSpeed engine, data loader, metrics, TensorBoard) around the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.equal_flops import dense_with_equal_flops
from data_pipeline.batch import PackedBatch
from data_pipeline.loader import StepLoader
from megadlcm.config import RunConfig, load_config
from megadlcm.model import DLCM, LanguageModel, build_model
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.compression import ratio_gradient_scale
from megadlcm.ops.cross_entropy import token_cross_entropy
from megadlcm.parallel.mesh import ParallelMesh, join_process_group
from megadlcm.pretrain import open_trainer
from megadlcm.training.optimizer import build_optimizer


class BareLoop:
    """What a researcher would write: nothing but the arithmetic of a step."""

    def __init__(self, config: RunConfig, calibration: PackedBatch | None) -> None:
        self.config = config
        self.model: LanguageModel = build_model(config.model, config.mup, seed=config.seed)
        if isinstance(self.model, DLCM) and calibration is not None:
            tokens_T, _, cu_seqlens, _ = _tensors(calibration, config, 0)
            with torch.no_grad():
                cosine_T = self.model.boundaries(tokens_T, cu_seqlens).cosine_T
            self.model.boundary_detector.calibrate(cosine_T[1:])
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0

    def run(self, batch: PackedBatch) -> None:
        """Trains on one micro-batch that is the whole global batch."""
        config = self.config
        tokens_T, labels_T, cu_seqlens, sampling = _tensors(batch, config, self.step)
        output = self.model(tokens_T, cu_seqlens, sampling)
        loss = token_cross_entropy(output.logits_TV, labels_T).mean()
        if output.boundary is not None:
            fraction = output.boundary.mask_T.float().mean()
            scale = ratio_gradient_scale(fraction, config.model.target_tokens_per_concept)
            weight = config.training.ratio_loss_weight
            loss = loss + weight * scale * output.boundary.prob_T.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def measure(config: RunConfig, rounds: int, steps: int) -> dict[str, object]:
    """Times the three loops in turn.

    Args:
        config: a run in fp32 on one process, its micro-batch the whole global batch.
        rounds: repetitions of the three.
        steps: steps of each in a round.

    Returns:
        Median ratios, their range, and what was compared.
    """
    mesh = join_process_group()
    batches = _read_batches(config, steps)
    dense_model = dense_with_equal_flops(config.model, config.data.seq_len)
    dense_config = dataclasses.replace(config, model=dense_model)
    loops = {"dlcm": BareLoop(config, batches[0]), "dense": BareLoop(dense_config, None)}
    seconds: dict[str, list[float]] = {"dlcm": [], "dense": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer_config = dataclasses.replace(config, output_dir=folder)
        with open_trainer(trainer_config, _mesh(mesh)) as trainer:
            for index in range(rounds + 1):
                for name, loop in loops.items():
                    with _timed(seconds[name]):
                        for batch in batches:
                            loop.run(batch)
                with _timed(seconds["trainer"]):
                    for _ in range(steps):
                        trainer.train_one()
                if index == 0:  # the first round warms up
                    seconds = {name: [] for name in seconds}
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        "dense": dataclasses.asdict(dense_model),
        "tokens_per_second": {
            name: tokens / statistics.median(values) for name, values in seconds.items()
        },
        "dlcm_over_dense": _ratio(seconds["dense"], seconds["dlcm"]),
        "trainer_over_bare": _ratio(seconds["dlcm"], seconds["trainer"]),
        "rounds": rounds,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }


def _mesh(mesh: ParallelMesh) -> ParallelMesh:
    if mesh.world_size != 1:
        raise SystemExit("the benchmark runs in one process")
    return mesh


def _read_batches(config: RunConfig, steps: int) -> list[PackedBatch]:
    training = config.training
    if training.micro_batch_size != training.global_batch_size:
        raise SystemExit("set training.micro_batch_size to training.global_batch_size")
    loader = StepLoader(
        config.data,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
    )
    try:
        return [next(loader).micro_batches[0] for _ in range(steps)]
    finally:
        loader.close()


def _tensors(
    batch: PackedBatch, config: RunConfig, step: int
) -> tuple[Tensor, Tensor, Tensor, BoundarySampling]:
    index_T = torch.from_numpy(batch.token_index_T)
    return (
        torch.from_numpy(batch.tokens_T),
        torch.from_numpy(batch.labels_T),
        torch.from_numpy(batch.cu_seqlens),
        BoundarySampling(config.seed, step, index_T),
    )


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def _ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    ratios = [top / bottom for top, bottom in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    length = f"training.train_steps={(arguments.rounds + 1) * arguments.steps + 1}"
    config = load_config(arguments.config, [*arguments.overrides, length])
    print(json.dumps(measure(config, arguments.rounds, arguments.steps), indent=1))


if __name__ == "__main__":
    main()
