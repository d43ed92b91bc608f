"""Batches are encoded in order, here or in processes, and fail with the first flaw of the input."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputError
from data_pipeline.prepare.encode import (
    Batch,
    DocumentRules,
    EncodedBatch,
    Encoders,
    encode_batch,
    make_batches,
)
from data_pipeline.prepare.formats.format import InputFile, Piece, Position
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_shards import TEXTS


def batch_of(number: int, contents: bytes) -> Batch:
    """A batch of one line."""
    file = InputFile(Path("a.jsonl"), "a.jsonl", 0)
    piece = Piece(file, Position(0, number, number), contents, 1)
    return Batch(0, (piece,), frozenset(), is_last=False)


def batches() -> Iterator[Batch]:
    """A text in each batch."""
    for number, text in enumerate(TEXTS * 6):
        yield batch_of(number, json.dumps({"text": text}).encode())


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """Of TEXTS."""
    return load_tokenizer(tokenizer_file)


def encode_all(given: Iterator[Batch], tokenizer: Tokenizer, workers: int) -> list[EncodedBatch]:
    """The results of all batches."""
    with Encoders(tokenizer, DocumentRules(), workers) as encoders:
        return [found for _, found in encoders.map(encode_batch, given)]


def test_workers_need_no_tokenizer_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They may start when it is gone; the results are those of this process."""
    here = encode_all(batches(), tokenizer, 1)
    homeless = replace(tokenizer, path=tmp_path / "absent.json")
    there = encode_all(batches(), homeless, 2)
    assert len(here) == 6 * len(TEXTS)
    for mine, its in zip(here, there, strict=True):
        assert mine.contents == its.contents and mine.numbers.tolist() == its.numbers.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_flaw_is_named(workers: int, tokenizer: Tokenizer) -> None:
    """Whichever process meets one first, and wherever reading has come by then."""

    def flawed(*bad: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            yield batch_of(number, b"no JSON") if number in bad else batch
        raise InputError("a.jsonl: damaged compressed file")

    with pytest.raises(InputError, match=r"a\.jsonl:4: not JSON"):
        encode_all(flawed(3, 4, 20), tokenizer, workers)
    with pytest.raises(InputError, match="damaged compressed file"):
        encode_all(flawed(), tokenizer, workers)


def test_a_killed_worker_ends_the_work(tokenizer: Tokenizer) -> None:
    """With a word on what to do: it must neither hang nor pass."""
    with (
        pytest.raises(RuntimeError, match="fewer --workers: it goes on"),
        Encoders(tokenizer, DocumentRules(), 2) as encoders,
    ):
        list(encoders.map(_kill_itself, batches()))


def _kill_itself(batch: Batch, tokenizer: Tokenizer, rules: DocumentRules) -> EncodedBatch:
    os.kill(os.getpid(), signal.SIGKILL)
    return encode_batch(batch, tokenizer, rules)


def test_batches_are_large_and_bounded_and_know_their_duplicates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is marked as the last, also where there is nothing."""
    monkeypatch.setattr("data_pipeline.prepare.encode.BATCH_BYTES", 10)
    pieces = [batch_of(number, b"1234").pieces[0] for number in range(8)]
    found = list(make_batches(7, pieces, np.array([0, 2, 3, 7])))
    assert [len(batch.pieces) for batch in found] == [3, 3, 2]
    assert [sorted(batch.duplicates) for batch in found] == [[0, 2], [3], [7]]
    assert [batch.is_last for batch in found] == [False, False, True]
    assert [batch.part for batch in found] == [7, 7, 7]
    assert list(make_batches(7, [])) == [Batch(7, (), frozenset(), True)]
