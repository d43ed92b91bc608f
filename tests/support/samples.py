"""Samples of a configuration, and what must be true of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipeline import open_samples
from data_pipeline.config import DataConfig
from data_pipeline.errors import DamagedDataError
from data_pipeline.reading.batch import Sample
from data_pipeline.reading.sources import SourceSummary, check_shards, open_sources
from tests.support.tiny_shards import EOS


def assert_trained_once(samples: Iterable[Sample], lengths: Sequence[int]) -> None:
    """Checks that samples of numbered documents hold each document's stream exactly once."""
    last_tokens = np.cumsum(lengths)
    first_tokens = set((last_tokens - lengths + 1).tolist())
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inputs: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    for sample in samples:
        assert sample.tokens_T.dtype == sample.labels_T.dtype == np.int64
        assert sample.cu_seqlens.dtype == np.int32
        assert sample.cu_seqlens[0] == 0 and sample.cu_seqlens[-1] == len(sample.tokens_T)
        assert len(sample.document_ids) == len(sample.cu_seqlens) - 1
        inputs.update(sample.tokens_T.tolist())
        labels.update(sample.labels_T.tolist())
        bounds = zip(sample.cu_seqlens[:-1], sample.cu_seqlens[1:], strict=True)
        for name, (start, stop) in zip(sample.document_ids, bounds, strict=True):
            assert start < stop
            document = int(name)
            for token, label in zip(
                sample.tokens_T[start:stop].tolist(),
                sample.labels_T[start:stop].tolist(),
                strict=True,
            ):
                if token == EOS:
                    assert label in first_tokens and owner[label - 1] == document
                elif token == last_tokens[document]:
                    assert label == EOS
                else:
                    assert owner[token - 1] == document and label == token + 1
            chained = sample.labels_T[start : stop - 1] == sample.tokens_T[start + 1 : stop]
            assert chained.all()
    expected = dict.fromkeys(range(1, int(last_tokens[-1]) + 1), 1) | {EOS: len(lengths)}
    assert labels == expected
    assert inputs == expected


def epoch_of(data: DataConfig, epoch: int = 0) -> list[Sample]:
    """Returns the samples of one epoch of a configuration with one source."""
    first = next(open_samples(data))
    assert first.epoch == 0
    found: list[Sample] = []
    for sample in open_samples(data):
        if sample.epoch > epoch:
            return found
        if sample.epoch == epoch:
            found.append(sample)
    raise AssertionError


def check_sources(data: DataConfig, vocab_size: int) -> SourceSummary:
    """Does what a run does before its first step, in one process."""
    summary = open_sources(data, vocab_size)
    for found in check_shards(data):
        raise DamagedDataError(found.problem)
    return summary
