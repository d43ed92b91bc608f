"""Shard folders of made-up documents: small ones on disk, and the index alone of enormous ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.shard_format.index import (
    SHARD_DTYPE,
    DomainCounts,
    ShardIndex,
    ShardList,
    encode_index,
)
from data_pipeline.shard_format.records import encode_record
from data_pipeline.shard_format.table import DOCUMENT_DTYPE, encode_table
from data_pipeline.shard_format.tar import RECORD_BYTES, archive_end

VOCAB_SIZE = 50_280
EOS_ID = VOCAB_SIZE - 1
MEAN_TOKENS = 714
"""Tokens of a document on average: 14,000 documents in a shard of 10M tokens."""
LENGTH_SPREAD = 1.2
"""Standard deviation of the logarithm of a document's tokens, as text from the web has it."""
BYTES_PER_TOKEN = 4
_MODEL = {"type": "BPE", "vocab": {"<|endoftext|>": EOS_ID}, "merges": []}
_TOKENIZER = json.dumps({"added_tokens": [], "model": _MODEL}).encode()


def document_lengths(
    shard: int, num_documents: int, num_tokens: int, seed: int = 0, spread: float = LENGTH_SPREAD
) -> np.ndarray:
    """Returns the tokens of each document of a shard, a function of its arguments alone.

    Args:
        shard: number of the shard.
        num_documents: documents in it.
        num_tokens: what they add up to, >= num_documents.
        seed: chooses the lengths.
        spread: standard deviation of their logarithm.

    Returns:
        int64 (num_documents,), each >= 1.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, shard))))
    shares = random.lognormal(sigma=spread, size=num_documents)
    free = num_tokens - num_documents
    lengths = 1 + np.floor(shares / shares.sum() * free).astype(np.int64)
    lengths[: num_tokens - int(lengths.sum())] += 1
    return lengths


def write_corpus(folder: Path, num_shards: int, shard_tokens: int, seed: int = 0) -> ShardIndex:
    """Writes a folder of random tokens in documents of realistic lengths.

    Args:
        folder: made here.
        num_shards: number of shards.
        shard_tokens: text tokens of each.
        seed: chooses lengths and tokens.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows, first_document = [], 0
    for number in range(num_shards):
        lengths = document_lengths(number, shard_tokens // MEAN_TOKENS, shard_tokens, seed)
        tokens = random.integers(0, EOS_ID, shard_tokens, dtype=np.uint16)
        documents = np.split(tokens, np.cumsum(lengths)[:-1])
        rows.append(_write_shard(folder, number, first_document, documents))
        first_document += len(documents)
    index = _index_of(folder, np.array(rows, dtype=SHARD_DTYPE), "web")
    from data_pipeline.tokenizer import TOKENIZER_FILE  # its library is no part of reading

    (folder / TOKENIZER_FILE).write_bytes(_TOKENIZER)
    write_index(folder, index)
    return index


def _write_shard(
    folder: Path, number: int, first_document: int, documents: Sequence[np.ndarray]
) -> tuple[int | bytes, ...]:
    """Writes tar and document table; returns the shard's row of SHARD_DTYPE."""
    name = folder / f"shard-{number:06d}"
    rows, checksums, parts, size = [], [], [], 0
    for document, tokens in enumerate(documents, first_document):
        num_bytes = len(tokens) * BYTES_PER_TOKEN
        metadata: dict[str, object] = {
            "id": f"web-{document:012d}",
            "domain": "web",
            "source": "made up",
            "num_bytes": num_bytes,
            "num_tokens": len(tokens),
        }
        record = encode_record(f"{document:012d}", metadata, tokens)
        place = (size, size + record.tokens_at, len(tokens), num_bytes, record.metadata_bytes, 0)
        rows.append(place)
        checksums.append(record.checksums)
        parts.append(record.contents)
        size += len(record.contents)
    parts.append(archive_end(size))
    tar = b"".join(parts)
    table = encode_table(np.array(rows, dtype=DOCUMENT_DTYPE), np.concatenate(checksums), ["web"])
    name.with_suffix(".tar").write_bytes(tar)
    name.with_suffix(".documents.npy").write_bytes(table)
    num_tokens = sum(len(tokens) for tokens in documents)
    return (
        len(documents),
        num_tokens,
        num_tokens * BYTES_PER_TOKEN,
        len(tar),
        rows[-1][0],
        hashlib.sha256(tar).digest(),
        hashlib.sha256(table).digest(),
    )


def enormous_index(
    folder: Path, num_shards: int, shard_tokens: int, domain: str, seed: int = 0
) -> ShardIndex:
    """Returns the index of a folder whose shards exist nowhere.

    Args:
        folder: where they would lie.
        num_shards: number of shards.
        shard_tokens: most text tokens of each; up to a document less, as whole documents leave.
        domain: of all documents.
        seed: chooses documents and tokens of each shard.
    """
    random = np.random.default_rng((seed, num_shards))
    rows = np.zeros(num_shards, dtype=SHARD_DTYPE)
    usual = shard_tokens // MEAN_TOKENS
    rows["num_tokens"] = shard_tokens - random.integers(0, MEAN_TOKENS, num_shards)
    rows["num_documents"] = random.integers(usual * 9 // 10, usual * 11 // 10 + 1, num_shards)
    rows["num_bytes"] = rows["num_tokens"] * BYTES_PER_TOKEN
    rows["tar_bytes"] = rows["num_tokens"] * 2 // RECORD_BYTES * RECORD_BYTES
    rows["last_record"] = rows["tar_bytes"] - RECORD_BYTES
    # digests do not compress, and no two shards share one
    for name in ("tar_sha256", "table_sha256"):
        rows[name] = np.frombuffer(random.bytes(32 * num_shards), dtype="V32")
    return _index_of(folder, rows, domain)


def _index_of(folder: Path, rows: np.ndarray, domain: str) -> ShardIndex:
    totals = (int(rows[name].sum()) for name in ("num_documents", "num_tokens", "num_bytes"))
    return ShardIndex(
        location=str(folder),
        shards=ShardList(rows),
        domains={domain: DomainCounts(*totals)},
        tokenizer_sha256=hashlib.sha256(_TOKENIZER).hexdigest(),
        vocab_size=VOCAB_SIZE,
        eos_id=EOS_ID,
        max_token_id=EOS_ID,
        token_dtype="uint16",
    )


def write_index(folder: Path, index: ShardIndex) -> int:
    """Writes the files of an index and returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = encode_index(index)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return sum(len(contents) for contents in files.values())
