"""Shards of a folder of text in four domains, made once for all experiments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DOMAINS = ("en", "zh", "code", "math")
# the DLCM paper's mix
WEIGHTS = {"en": 0.50, "zh": 0.25, "code": 0.15, "math": 0.10}
VOCAB_SIZE = 8192


def megadlcm(*arguments: str, log: Path | None = None) -> None:
    """Runs one command of the command line; raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "megadlcm", *arguments]
    if log is None:
        subprocess.run(command, check=True)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)


def prepare_shards(text: Path, folder: Path) -> list[str]:
    """Trains a tokenizer on the training text and writes shards for each domain and split.

    Args:
        text: folder with `train/<domain>_*.jsonl.gz` and `valid/<domain>.jsonl.gz`.
        folder: where tokenizer and shards go; what is there already is kept.

    Returns:
        Config overrides that name the shards.
    """
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        inputs = f"--input={text}/train/*.jsonl.gz"
        megadlcm("data", "tokenizer", inputs, f"--vocab-size={VOCAB_SIZE}", f"--output={tokenizer}")
    overrides = []
    for split, pattern in (("train", "train/{}_*.jsonl.gz"), ("valid", "valid/{}.jsonl.gz")):
        sources = []
        for domain in DOMAINS:
            shards = folder / f"{domain}_{split}"
            sources.append({"path": str(shards), "weight": WEIGHTS[domain], "name": domain})
            if not (shards / "index.json").exists():
                inputs = f"--input={text / pattern.format(domain)}"
                megadlcm(
                    "data", "prepare", inputs, f"--tokenizer={tokenizer}", f"--output={shards}",
                    "--shard-tokens=500000",
                )  # fmt: skip
        overrides.append(f"data.{split}={json.dumps(sources)}")
    return overrides
