"""From nothing to a trained, evaluated DLCM: the commands that a user would type, one by one."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launchers.standard_library_text import write_corpus

_REPOSITORY = Path(__file__).resolve().parents[1]
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
    start = time.monotonic()
    folder: Path = arguments.folder
    run_folder = folder / "run"
    overrides = [*_prepare_data(folder / "data", arguments.code_bytes), f"output_dir={run_folder}"]
    config = _REPOSITORY / "configs" / "quickstart.yaml"
    _megadlcm("train", str(config), *overrides, *arguments.overrides)
    _report(run_folder, time.monotonic() - start)
    return 0


def _prepare_data(folder: Path, code_bytes: int) -> list[str]:
    """Makes text, tokenizer and shards where they are missing; returns the config overrides."""
    print(f"writing the text of this Python's standard library to {folder}", flush=True)
    texts = write_corpus(folder / "text", code_bytes)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        inputs = [f"--input={texts[f'{domain}_train']}" for domain in _DOMAINS]
        options = (f"--vocab-size={_VOCAB_SIZE}", f"--output={tokenizer}")
        _megadlcm("data", "tokenizer", *inputs, *options)
    sources: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for split, entries in sources.items():
        for domain in _DOMAINS:
            shards = folder / f"{domain}_{split}"
            entries.append({"path": str(shards), "weight": 1.0, "name": domain})
            if not (shards / "index.json").exists():
                text = texts[f"{domain}_{split}"]
                _megadlcm(
                    "data", "prepare", f"--input={text}", f"--tokenizer={tokenizer}",
                    f"--output={shards}", "--shard-tokens=500000",
                )  # fmt: skip
    return [f"data.{split}={json.dumps(entries)}" for split, entries in sources.items()]


def _megadlcm(*arguments: str) -> None:
    """Runs one command of the command line, showing it first."""
    print(f"\n$ megadlcm {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megadlcm", *arguments], check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def _report(run_folder: Path, seconds: float) -> None:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    # without held-out data, or without concepts, there is less to tell
    evaluation = [{}, *(row for row in rows if "eval_loss" in row)][-1]
    last = steps[-1]
    recent = steps[-max(len(steps) // 3, 1) :]
    speed = sorted(row["tokens_per_second"] for row in recent)[len(recent) // 2]
    print(f"\n== quickstart: {last['step']} steps, {seconds / 60:.1f} minutes in all ==")
    print(f"training loss            {steps[0]['loss']:.3f} -> {last['loss']:.3f} nats per token")
    if evaluation:
        print(f"held-out loss            {evaluation['eval_loss']:.3f} nats per token")
        print(f"held-out bits per byte   {evaluation['bits_per_byte']:.3f}")
    if "tokens_per_concept" in last:
        ratio = sum(row["tokens_per_concept"] for row in recent) / len(recent)
        print(f"tokens per concept       {ratio:.2f} as trained (mean of the last third)")
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


if __name__ == "__main__":
    sys.exit(main())
