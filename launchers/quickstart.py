"""From nothing to a trained, evaluated DLCM: the commands that a user would type, one by one.

Every quickstart makes its data again, which takes seconds, and trains from scratch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launchers.standard_library_text import write_corpus
from megadlcm.config import InputError, load_config

_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
_DOMAINS = ("en", "code")
_VOCAB_SIZE = 4096
_CODE_BYTES = 6_000_000
_MARK = "\u2502"  # the sample texts' own


def main() -> int:
    """Builds the corpus, trains, evaluates and prints a report.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/quickstart"), help="default: %(default)s"
    )
    parser.add_argument(
        "--code-bytes",
        type=int,
        default=_CODE_BYTES,
        metavar="N",
        help="about how much source code the corpus has (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", help="config overrides, key=value")
    arguments = parser.parse_args()
    if any(override.startswith("output_dir=") for override in arguments.overrides):
        parser.error("output_dir is the folder `run` of --folder; give that instead")
    try:
        _run(arguments.folder, arguments.code_bytes, arguments.overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(folder: Path, code_bytes: int, overrides: list[str]) -> None:
    start = time.monotonic()
    run_folder = folder / "run"
    overrides = [f"output_dir={run_folder}", *overrides]
    load_config(_CONFIG, overrides)  # a slip of the pen must not cost the earlier run
    _remove_earlier_run(run_folder)
    _megadlcm("train", str(_CONFIG), *_prepare_data(folder / "data", code_bytes), *overrides)
    print_report(run_folder, time.monotonic() - start)


def _remove_earlier_run(run_folder: Path) -> None:
    """Removes what an earlier quickstart left; raises InputError where that is no run folder."""
    if not run_folder.exists():
        return
    names = {path.name for path in run_folder.iterdir()} if run_folder.is_dir() else {""}
    # a run that ends early has nothing but logs
    is_run = names <= {"logs"} or names & {"config.yaml", "metrics.jsonl"}
    if run_folder.is_symlink() or not is_run:
        raise InputError(
            f"{run_folder} is not the folder of a run and stays as it is; choose another --folder"
        )
    print(f"removing the earlier run in {run_folder}", flush=True)
    shutil.rmtree(run_folder)


def _prepare_data(folder: Path, code_bytes: int) -> list[str]:
    """Makes text, tokenizer and shards, whatever is there; returns the config overrides."""
    print(f"writing the text of this Python's standard library to {folder}", flush=True)
    texts = write_corpus(folder / "text", code_bytes)
    tokenizer = folder / "tokenizer.json"
    inputs = [f"--input={texts[f'{domain}_train']}" for domain in _DOMAINS]
    options = (f"--vocab-size={_VOCAB_SIZE}", f"--output={tokenizer}", "--overwrite")
    _megadlcm("data", "tokenizer", *inputs, *options)
    sources: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for split, entries in sources.items():
        for domain in _DOMAINS:
            shards = folder / f"{domain}_{split}"
            entries.append({"path": str(shards), "weight": 1.0, "name": domain})
            _megadlcm(
                "data", "prepare", f"--input={texts[f'{domain}_{split}']}",
                f"--tokenizer={tokenizer}", f"--output={shards}", "--shard-tokens=500000",
                "--overwrite",
            )  # fmt: skip
    return [f"data.{split}={json.dumps(entries)}" for split, entries in sources.items()]


def _megadlcm(*arguments: str) -> None:
    """Runs one command of the command line, showing it first."""
    print(f"\n$ megadlcm {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megadlcm", *arguments], check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def print_report(run_folder: Path, seconds: float) -> None:
    """Prints what a finished run has come to.

    Args:
        run_folder: the run folder.
        seconds: time since the quickstart began.
    """
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    # without held-out data, or without concepts, there is less to tell
    evaluation = [{}, *(row for row in rows if "eval_loss" in row)][-1]
    last = steps[-1]
    recent = steps[-max(len(steps) // 3, 1) :]
    speed = sorted(row["tokens_per_second"] for row in recent)[len(recent) // 2]
    print(
        f"\n== quickstart: {last['step']} steps, {seconds / 60:.1f} minutes in all; "
        "ratios and speed over the last third =="
    )
    print(f"training loss            {steps[0]['loss']:.3f} -> {last['loss']:.3f} nats per token")
    if evaluation:
        print(f"held-out loss            {evaluation['eval_loss']:.3f} nats per token")
        print(f"held-out bits per byte   {evaluation['bits_per_byte']:.3f}")
    if "tokens_per_concept" in last:
        sampled, thresholded = (
            _tokens_over_concepts([row[key] for row in recent])
            for key in ("tokens_per_concept", "tokens_per_concept_threshold")
        )
        print(f"tokens per concept       {sampled:.2f} as trained (sampled)")
        print(f"                         {thresholded:.2f} as at inference (thresholded)")
    if "tokens_per_concept" in evaluation:
        by_domain = evaluation["tokens_per_concept"].items()
        listed = ", ".join(f"{name} {value:.2f}" for name, value in by_domain)
        print(f"  held-out, by domain    {listed}")
    print(f"tokens per second        {speed:,.0f}")
    samples = sorted((run_folder / "samples").glob("*.txt"))
    if samples:
        print(f"\nsample text, '{_MARK}' marks concept boundaries ({samples[-1]}):")
        print("\n".join(samples[-1].read_text(encoding="utf-8").splitlines()[:14]))
    print(f"\ncurves: tensorboard --logdir {run_folder / 'tensorboard'}")


def _tokens_over_concepts(ratios: list[float]) -> float:
    """The ratio over steps of equally many tokens together."""
    return len(ratios) / sum(1.0 / ratio for ratio in ratios)


if __name__ == "__main__":
    sys.exit(main())
