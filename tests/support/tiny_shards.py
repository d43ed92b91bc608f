"""Tiny corpora: texts, and documents whose tokens are all different so that each can be traced."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.prepare.encode import Batch, DocumentRules, join_records
from data_pipeline.prepare.formats.format import BEGINNING, InputFile, Piece, TextDocument
from data_pipeline.prepare.parts import PartState, PartWriter
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.publish import publish
from data_pipeline.prepare.work_folder import WorkFolder
from data_pipeline.shard_format.index import ShardIndex, read_index
from data_pipeline.tokenizer import Tokenizer, decode_tokenizer

TEXTS = [
    "The cat sat on the mat, and the mat was flat.\n",
    "def add(left, right):\n    return left + right\n",
    "Es war einmal ein K\u00f6nig, der hatte drei S\u00f6hne.",
    "\u5929\u5730\u7384\u9ec4\u5b87\u5b99\u6d2a\u8352",
    "x",
    " and so on" * 40,
]
NUMBERED_VOCAB = 60_000
EOS = 0


def numbered_documents(lengths: Sequence[int]) -> list[np.ndarray]:
    """Returns documents in which no token occurs twice: 1, 2, 3, ... throughout; 0 is eos."""
    ends = np.cumsum(lengths)
    if ends[-1] >= NUMBERED_VOCAB:
        raise ValueError("too many tokens to number")
    return [
        np.arange(end - length + 1, end + 1, dtype="<u2")
        for end, length in zip(ends, lengths, strict=True)
    ]


def write_numbered_folder(folder: Path, lengths: Sequence[int], shard_tokens: int) -> ShardIndex:
    """Writes numbered documents called "0", "1", ... as a shard folder."""
    vocab = {"<|endoftext|>": EOS, "the largest": NUMBERED_VOCAB - 1}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    contents = json.dumps({"added_tokens": [], "model": model}).encode()
    documents = [
        (TextDocument(str(number), "numbers", "test", "", len(tokens), ""), tokens)
        for number, tokens in enumerate(numbered_documents(lengths))
    ]
    return write_documents(folder, decode_tokenizer(contents, folder), documents, shard_tokens)


def write_documents(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Sequence[tuple[TextDocument, np.ndarray]],
    shard_tokens: int,
) -> ShardIndex:
    """Writes documents whose tokens are given as a shard folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan((), tokenizer.sha256, shard_tokens, 1, False, DocumentRules())
    work = WorkFolder(folder)
    encoded = join_records(0, [(number, *both) for number, both in enumerate(documents)])
    piece = Piece(InputFile(folder, "", 0), BEGINNING, b"", len(documents))
    with work.gate():
        work.begin(plan)
        with work.lock_part(0):
            writer = PartWriter(work.part(0), PartState(), shard_tokens)
            writer.add(Batch(0, (piece,), frozenset(), True), encoded)
            publish(work, plan, tokenizer, [writer.finish(BEGINNING)])
    return read_index(folder)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """Writes texts with ids d0, d1, ... and the domains a, b in turn; gzip where so named."""
    records = [
        {"id": f"d{number}", "domain": "ab"[number % 2], "source": "here", "text": text}
        for number, text in enumerate(texts)
    ]
    contents = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(contents, mtime=0) if path.suffix == ".gz" else contents)
    return path


def config_of(*sources: SourceConfig, seq_len: int = 16, **options: Any) -> DataConfig:
    """Returns a configuration that trains on the sources."""
    return DataConfig(train=sources, seq_len=seq_len, **options)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Returns the message of an error after checking that it is one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message
