"""Real held-out documents of four domains, where they are at hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.shards import open_documents
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify_folder
from data_pipeline.write_shards import PrepareOptions, prepare

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(
    not (DATA / "valid").is_dir(),
    reason="no ../shared/data beside the checkout; put {valid,tokenizer}/ there to run it",
)
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_real_documents_have_the_tokens_of_an_encode_made_apart(name: str, tmp_path: Path) -> None:
    """Counts per document and domain against the library called one text at a time."""
    tokenizer = load_tokenizer(DATA / "tokenizer" / name)
    records = [
        json.loads(line)
        for path in sorted((DATA / "valid").glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        if line
    ]
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
