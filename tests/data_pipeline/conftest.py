"""Tiny tokenizers and shard folders, built afresh below pytest's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.tokenizer import train_tokenizer
from tests.support.tiny_shards import TEXTS, write_jsonl, write_numbered_folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on TEXTS."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer(TEXTS * 3, vocab_size=300))
    return path


@pytest.fixture
def make_numbered(tmp_path: Path) -> Callable[..., SourceConfig]:
    """Function(lengths, shard_tokens, name, weight) -> a source of numbered documents."""

    def make(
        lengths: Sequence[int], shard_tokens: int = 50, name: str = "numbers", weight: float = 1.0
    ) -> SourceConfig:
        write_numbered_folder(tmp_path / name, lengths, shard_tokens)
        return SourceConfig(str(tmp_path / name), weight, name)

    return make


@pytest.fixture
def make_shards(tmp_path: Path, tokenizer_file: Path) -> Callable[..., Path]:
    """Function(name, texts, **prepare options) -> shard folder of those texts."""

    def make(name: str = "shards", texts: Sequence[str] = TEXTS, **options: Any) -> Path:
        # below a folder: what the file is called shapes the result
        (tmp_path / f"{name}-texts").mkdir(exist_ok=True)
        source = write_jsonl(tmp_path / f"{name}-texts" / "a.jsonl", texts)
        options.setdefault("tokenizer", tokenizer_file)
        prepare(PrepareOptions(inputs=(str(source),), output=tmp_path / name, **options))
        return tmp_path / name

    return make
