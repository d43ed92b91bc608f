"""Shards are reproducible, ordinary WebDataset files, and finished only with their index."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import open_samples, read_index
from data_pipeline.config import SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.format import TextDocument
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.reading.shards import open_documents
from data_pipeline.tokenizer import load_tokenizer
from tests.support.tiny_shards import TEXTS, config_of, one_line, write_documents

MakeShards = Callable[..., Path]


def contents(folder: Path) -> dict[str, str]:
    """Returns the digest of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


READ_WITH_WEBDATASET = """
import json, sys, webdataset
dataset = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False).decode()
for record in dataset:
    tokens = record["npy"]
    print(json.dumps([record["__key__"], record["json"], str(tokens.dtype), tokens.tolist()]))
"""


def test_stock_webdataset_reads_the_shards(make_shards: MakeShards, tokenizer_file: Path) -> None:
    """Keys, metadata and tokens through the library's own decoder, in a process of its own."""
    folder = make_shards(shard_tokens=60)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    assert len(urls) > 1
    tokenizer = load_tokenizer(tokenizer_file)
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, *urls]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    assert len(records) == len(TEXTS)
    for number, (record, text) in enumerate(zip(records, TEXTS, strict=True)):
        ids = tokenizer.encode(text)
        metadata = {
            "id": f"d{number}",
            "domain": "ab"[number % 2],
            "source": "here",
            "num_bytes": len(text.encode()),
            "num_tokens": len(ids),
        }
        assert record == [f"000000-{number:012d}", metadata, "uint16", ids]


def test_the_index_adds_up_and_documents_come_back(
    make_shards: MakeShards, tokenizer_file: Path
) -> None:
    """Counts by shard and by domain, texts in the order they came."""
    folder = make_shards(shard_tokens=60)
    index = read_index(folder)
    tokenizer = load_tokenizer(tokenizer_file)
    documents = list(open_documents(folder))
    assert [tokenizer.decode(document.tokens_T) for document in documents] == TEXTS
    assert [document.id for document in documents] == [f"d{n}" for n in range(len(TEXTS))]
    assert documents[0].tokens_T.dtype == np.int64
    assert index.num_documents == len(TEXTS)
    assert index.num_tokens == sum(len(document.tokens_T) for document in documents)
    assert index.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert index.domains["b"].bytes == sum(len(text.encode()) for text in TEXTS[1::2])
    assert index.max_token_id == max(int(d.tokens_T.max()) for d in documents)
    assert (index.eos_id, index.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert len(index.shards) > 1
    assert [d.id for d in open_documents(folder, max_documents=4)] == ["d0", "d1", "d2", "d3"]


def test_a_shard_is_full_before_the_next_begins(make_shards: MakeShards) -> None:
    """A document longer than a shard has one of its own."""
    folder = make_shards(texts=["a b c d"] * 6 + ["e f " * 30] + ["x"], shard_tokens=16)
    sizes = [(shard.num_documents, shard.num_tokens) for shard in read_index(folder).shards]
    long = [size for size in sizes if size[1] > 16]
    assert len(long) == 1 and long[0][0] == 1
    assert all(one[1] + 1 <= 16 for one in sizes if one not in long)
    assert sum(documents for documents, _ in sizes) == 8


def test_the_same_input_gives_the_same_bytes_whatever_the_workers(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches small enough that the workers finish out of turn."""
    monkeypatch.setattr("data_pipeline.prepare.pieces.PIECE_BYTES", 200)
    monkeypatch.setattr("data_pipeline.prepare.encode.BATCH_BYTES", 300)
    texts = [text * (1 + number % 7) for number, text in enumerate(TEXTS * 4)]
    one = contents(make_shards("one", texts, shard_tokens=100))
    two = contents(make_shards("two", texts, shard_tokens=100, workers=2))
    assert one == two and len(one) > 5
    other = contents(make_shards("other", texts[::-1], shard_tokens=100))
    assert other["index.json"] != one["index.json"]


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path, tokenizer_file: Path) -> None:
    """And read back as the same numbers."""
    from dataclasses import replace

    tokenizer = replace(load_tokenizer(tokenizer_file), vocab_size=100_000)
    tokens = np.array([99_999, 1, 70_000], dtype=np.uint32)
    document = TextDocument("d", "a", "s", "", 9, "here")
    index = write_documents(tmp_path, tokenizer, [(document, tokens)], 1000)
    assert (index.token_dtype, index.max_token_id) == ("uint32", 99_999)
    assert next(open_documents(tmp_path)).tokens_T.tolist() == tokens.tolist()
    sample = next(open_samples(config_of(SourceConfig(str(tmp_path)))))
    assert sample.labels_T.tolist() == [*tokens.tolist(), tokenizer.eos_id]


def test_options_that_cannot_be_meant_are_refused(
    make_shards: MakeShards, tokenizer_file: Path, tmp_path: Path
) -> None:
    """Before anything is written."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"workers": 0}, "--workers 0"),
        ({"tokenizer": tmp_path / "absent"}, "no such file"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message) as error:
            make_shards(**options)
        one_line(error)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(InputError, match="no documents in 1 files") as error:
        make_shards(texts=[""], skip_empty=True)
    one_line(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        prepare(
            PrepareOptions((str(tmp_path / "*" / "*.jsonl"),), tokenizer_file, tmp_path / "file")
        )


def test_tar_members_tell_nothing_of_their_writer(make_shards: MakeShards, tmp_path: Path) -> None:
    """Time, owner and mode are fixed, so that a copy made elsewhere has the same digest."""
    folder = make_shards()
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 2 * len(TEXTS)
    facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
    assert facts == {(0, 0, 0, "", "", 0o644)}
    for name in ("index.json", "prepared.json"):
        assert str(tmp_path) not in (folder / name).read_text(encoding="utf-8")
