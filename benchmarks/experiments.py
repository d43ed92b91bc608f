"""Trains a small DLCM and its controls on real text and tabulates what held-out text says.

    python -m benchmarks.experiments ratio quality --text ../shared/data --folder runs/experiments

`ratio`: does the compression reach its target and stay there, drawn and thresholded, by target,
mode and seed; and what held-out text says of the tracked threshold and of the paper's 0.5.
`quality`: DLCM, the dense control at equal FLOPs per token, and fixed-R pooling, over seeds.
A run that is finished is not repeated; the tables are rewritten from all finished runs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.equal_flops import dense_with_equal_flops
from benchmarks.report import summarize, write_tables
from benchmarks.shared_text import VOCAB_SIZE, megadlcm, prepare_shards
from data_pipeline.tokenizer import TOKENIZER_FILE, load_tokenizer
from megadlcm.checkpoint.load_model import load_model
from megadlcm.config import load_config
from megadlcm.config.boundary_modes import BOUNDARY_MODES
from megadlcm.inference.evaluation import Evaluator
from megadlcm.model import DLCM
from megadlcm.parallel.process_group import join_process_group

_SHAPE = (
    f"model.vocab_size={VOCAB_SIZE}",
    "model.d_token=128",
    "model.d_concept=256",
    "model.encoder_layers=2",
    "model.backbone_layers=4",
    "model.decoder_layers=2",
    "model.token_heads=4",
    "model.token_kv_heads=2",
    "model.token_ffn_size=512",
    "model.concept_heads=8",
    "model.concept_kv_heads=4",
    "model.concept_ffn_size=512",
)
_SEQ_LEN = 256
_SEEDS = (0, 1, 2)
_RATIO_SEEDS = (0, 1)
# half of the tokens of a step and less held-out text: that many runs take two hours
_RATIO_BATCH = (
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
    "evaluation.max_documents=24",
)
_WAYS: dict[str, tuple[str, ...]] = {
    mode: (f"model.boundary_mode={mode}",) for mode in BOUNDARY_MODES
} | {"balanced_draw": ("model.balanced_draw=true",)}
_CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Experiment:
    """One training run: what is special about it, in config overrides."""

    suite: str
    model: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return f"{self.model}_seed{self.seed}"


def dense_overrides() -> tuple[str, ...]:
    """The dense control that costs as many forward FLOPs per token as the DLCM at R = 4."""
    dense = dense_with_equal_flops(load_config(_CONFIG, _SHAPE).model, _SEQ_LEN)
    return (
        "model.architecture=dense",
        f"model.token_kv_heads={dense.token_kv_heads}",
        f"model.token_ffn_size={dense.token_ffn_size}",
    )


def experiments(suites: list[str]) -> list[Experiment]:
    """Lists the runs of the named suites."""
    runs = []
    if "ratio" in suites:
        for seed, ratio, way in itertools.product(_RATIO_SEEDS, (2, 4, 8), _WAYS):
            target = f"model.target_tokens_per_concept={ratio}"
            overrides = (*_WAYS[way], target, *_RATIO_BATCH)
            runs.append(Experiment("ratio", f"{way}_r{ratio}", seed, overrides))
    if "quality" in suites:
        for seed in _SEEDS:
            runs.append(Experiment("quality", "dlcm", seed, ()))
            runs.append(Experiment("quality", "dense", seed, dense_overrides()))
            fixed = ("model.boundary_mode=fixed",)
            runs.append(Experiment("quality", "fixed", seed, fixed))
    return runs


def run_experiment(run: Experiment, data: list[str], folder: Path, steps: int) -> None:
    """Trains one run through the command line, unless it is finished with this very config."""
    run_folder = folder / run.name
    overrides = [
        *_SHAPE,
        *data,
        f"name={run.name}",
        f"seed={run.seed}",
        f"output_dir={run_folder}",
        f"training.train_steps={steps}",
        "training.global_batch_size=16",
        "training.micro_batch_size=16",
        f"data.seq_len={_SEQ_LEN}",
        "evaluation.interval_steps=0",
        f"checkpoint.interval_steps={steps}",
        "checkpoint.keep=1",
        *run.overrides,
    ]
    summary_file = run_folder / "summary.json"
    if not (summary_file.exists() and _same_config(run_folder, overrides)):
        shutil.rmtree(run_folder, ignore_errors=True)
        megadlcm("train", str(_CONFIG), *overrides, log=folder / f"{run.name}.log")
    summary = summarize(run_folder, run.suite, run.model, run.seed)
    if run.suite == "ratio":
        summary["at_half"] = evaluate_at_half(run_folder)
    summary_file.write_text(json.dumps(summary, indent=1) + "\n")


def evaluate_at_half(run_folder: Path) -> dict[str, Any]:
    """Evaluates a finished run with p >= 0.5, which training does not depend on."""
    config = load_config(run_folder / "config.yaml")
    model = load_model(run_folder)
    assert isinstance(model, DLCM)
    detector = model.boundary_detector
    # what a rule thresholds at is part of its training
    if config.model.boundary.is_learned:
        detector.config = dataclasses.replace(detector.config, track_threshold=False)
    tokenizer = load_tokenizer(Path(config.data.train[0].path) / TOKENIZER_FILE)
    return Evaluator(config, join_process_group(), tokenizer.eos_id).run(model)


def _same_config(run_folder: Path, overrides: list[str]) -> bool:
    return load_config(run_folder / "config.yaml") == load_config(_CONFIG, overrides)


def main() -> None:
    """Runs the suites and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="+", choices=("ratio", "quality"))
    parser.add_argument("--text", type=Path, required=True, help="folder of real text")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    data = prepare_shards(arguments.text, arguments.folder / "shards")
    runs = experiments(arguments.suites)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(run_experiment, run, data, arguments.folder, arguments.steps)
            for run in runs
        ]
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            write_tables(arguments.folder, arguments.results)


if __name__ == "__main__":
    main()
