"""Tiny corpora, configs and engines for the tests of training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.reading.loader import StepLoader
from data_pipeline.tokenizer import train_tokenizer
from megadlcm.config import RunConfig, config_from_dict
from megadlcm.engine.engine import TrainingEngine, build_engine
from megadlcm.parallel.partition import build_stage_model
from megadlcm.parallel.process_group import join_process_group
from megadlcm.run_folder.rows import MEASURED_KEYS

VOCAB_SIZE = 300
SEQ_LEN = 32
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "small",
    "birds",
    "in",
    "an",
    "old",
    "green",
    "tree",
    "near",
    "our",
    "house",
]


def random_text(seed: int, num_words: int) -> str:
    """Words in an order that depends on the seed only."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def write_corpus(folder: Path) -> Path:
    """Writes `tokenizer.json` and the shard folders `train`, `valid` and `short`.

    `short` has four windows, the last of which is not full.
    """
    texts = {
        "train": [random_text(seed, 30 + 7 * (seed % 5)) for seed in range(60)],
        "valid": [random_text(1000 + seed, 20 + 60 * (seed % 3)) for seed in range(6)],
    }
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(train_tokenizer(texts["train"], VOCAB_SIZE))
    texts["short"] = [random_text(2000 + seed, 26) for seed in range(3)]
    for name, documents in texts.items():
        source = folder / f"{name}.jsonl"
        records = [
            {"id": f"{name}{number}", "text": text, "domain": ("en", "code")[number % 2]}
            for number, text in enumerate(documents)
        ]
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        prepare(PrepareOptions((str(source),), tokenizer, folder / name))
    return folder


def run_values(corpus: Path, output_dir: Path, **sections: Any) -> dict[str, Any]:
    """A run of eight steps on a model of 16 to 32 features, as plain values."""
    values: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(output_dir),
        "model": {
            "architecture": "dlcm",
            "vocab_size": VOCAB_SIZE,
            "d_token": 16,
            "d_concept": 32,
            "encoder_layers": 1,
            "backbone_layers": 1,
            "decoder_layers": 1,
            "token_heads": 2,
            "token_kv_heads": 1,
            "concept_heads": 2,
            "concept_kv_heads": 2,
            "token_ffn_size": 32,
            "concept_ffn_size": 48,
        },
        "data": {
            "train": [{"path": str(corpus / "train"), "name": "train"}],
            "valid": [{"path": str(corpus / "valid"), "name": "valid"}],
            "seq_len": SEQ_LEN,
        },
        "parallel": {"zero_stage": 1},
        "training": {"train_steps": 8, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 2},
        "mup": {"base_width": 16},
        "checkpoint": {"interval_steps": 2},
        "evaluation": {"batch_tokens": 256},
        "logging": {"peak_tflops": 0.1},
    }
    for section, entries in sections.items():
        if isinstance(entries, dict):
            values[section] = values.get(section, {}) | entries
        else:
            values[section] = entries
    return values


def tiny_run(corpus: Path, output_dir: Path, **sections: Any) -> RunConfig:
    """The same as a checked config; keywords replace entries of sections."""
    return config_from_dict(run_values(corpus, output_dir, **sections))


def tiny_engine(config: RunConfig) -> TrainingEngine:
    """A fresh engine on the layout of its config."""
    mesh = join_process_group(config.parallel)
    return build_engine(build_stage_model(config, mesh), config, mesh)


def step_loader(config: RunConfig, start_sample: int = 0) -> StepLoader:
    """The loader that a run of one process would use."""
    return StepLoader(
        config.data,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        start_sample=start_sample,
    )


def without_timing(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows without the entries that two equal runs do not share."""
    for row in rows:
        yield {key: value for key, value in row.items() if key not in MEASURED_KEYS}
