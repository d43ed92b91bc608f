"""Real documents of four domains, where they are at hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.reading.packing import pack_windows
from data_pipeline.reading.samples import SampleReader
from data_pipeline.reading.shards import open_documents
from data_pipeline.tokenizer import load_tokenizer
from tests.support.paths import DATA

TRAIN_TOKENS = {"en": 3_821_364, "zh": 4_427_103, "code": 1_682_060, "math": 2_493_369}
"""Tokens of the training documents by the tokenizer gpt-neox-20b, counted where they come from."""

needs_data = pytest.mark.skipif(
    not (DATA / "valid").is_dir(),
    reason="no ../shared/data beside the checkout; put {train,valid,tokenizer}/ there to run it",
)


def read_texts(folder: Path) -> list[dict[str, str]]:
    """The records of a folder, by the standard library."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        if line
    ]


@needs_data
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_real_documents_have_the_tokens_of_an_encode_made_apart(name: str, tmp_path: Path) -> None:
    """Counts per document and domain against the library called one text at a time."""
    tokenizer = load_tokenizer(DATA / "tokenizer" / name)
    records = read_texts(DATA / "valid")
    expected: Counter[str] = Counter()
    for record in records:
        expected[record["domain"]] += len(tokenizer.backend.encode(record["text"]).ids)
    options = PrepareOptions(
        (str(DATA / "valid" / "*.jsonl.gz"),), tokenizer.path, tmp_path, shard_tokens=100_000
    )
    index = prepare(options).index
    assert index is not None
    assert {domain: counts.tokens for domain, counts in index.domains.items()} == expected
    assert index.num_bytes == sum(len(record["text"].encode()) for record in records)
    assert len(index.shards) > 3
    documents = list(open_documents(tmp_path))
    assert [document.id for document in documents] == [record["id"] for record in records]
    if name == "gpt2":  # the other one normalises to NFC
        for document, record in zip(documents, records, strict=True):
            assert tokenizer.decode(document.tokens_T) == record["text"]
    assert not list(verify_folder(index))


@needs_data
@pytest.mark.slow(50)
def test_two_epochs_of_all_training_documents_hold_every_token_twice(tmp_path: Path) -> None:
    """Each token of the vocabulary as often as in an encode made apart, in either epoch."""
    tokenizer = load_tokenizer(DATA / "tokenizer" / "gpt-neox-20b")
    options = PrepareOptions(
        (str(DATA / "train" / "*.jsonl.gz"),),
        tokenizer.path,
        tmp_path / "shards",
        shard_tokens=500_000,
        workers=2,
    )
    index = prepare(options).index
    assert index is not None and len(index.shards) > 20
    assert not list(verify_folder(index))
    assert {name: counts.tokens for name, counts in index.domains.items()} == TRAIN_TOKENS
    texts = [record["text"] for record in read_texts(DATA / "train")]
    expected = np.zeros(index.vocab_size, dtype=np.int64)
    for start in range(0, len(texts), 500):
        for encoding in tokenizer.backend.encode_batch_fast(texts[start : start + 500]):
            expected += np.bincount(encoding.ids, minlength=index.vocab_size)
    assert expected.sum() == sum(TRAIN_TOKENS.values())
    expected[index.eos_id] += len(texts)
    seq_len = 8192
    data = DataConfig(train=(SourceConfig(str(options.output)),), seq_len=seq_len)
    reader = SampleReader(data)
    num_windows = -(-index.num_stream_tokens // seq_len)
    for epoch in (0, 1):
        inputs, labels = np.zeros_like(expected), np.zeros_like(expected)
        for number in range(epoch * num_windows, (epoch + 1) * num_windows):
            batch = pack_windows([reader.window(number)], [0], seq_len)
            inputs += np.bincount(batch.tokens_T, minlength=index.vocab_size)
            labels += np.bincount(batch.labels_T, minlength=index.vocab_size)
        assert np.array_equal(labels, expected) and np.array_equal(inputs, expected)
