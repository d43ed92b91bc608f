"""Pieces of documents to samples, samples to packed micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.batch import PackedBatch, Sample, sample_digest


class Piece(NamedTuple):
    """Inputs and labels of a stretch of one document."""

    tokens_T: np.ndarray
    labels_T: np.ndarray


def cut_piece(
    read_tokens: Callable[[int, int], np.ndarray], num_tokens: int, start: int, stop: int, eos: int
) -> Piece:
    """Cuts places [start, stop) out of a document's stream.

    With t the document's n tokens: inputs [eos, t1..tn], labels [t1..tn, eos], n + 1 places each.
    The label of a piece's last place is the true next token, also where the piece is cut there.

    Args:
        read_tokens: (first, last) -> int64 tokens [first, last) of the text.
        num_tokens: n.
        start: first place, >= 0.
        stop: one past the last place, <= n + 1.
        eos: end-of-text token.

    Returns:
        int64 (stop - start,) inputs and labels.
    """
    first, last = max(start - 1, 0), min(stop, num_tokens)
    text = read_tokens(first, last)
    if len(text) != last - first:
        raise AssertionError(f"read {len(text)} tokens of {last - first}")
    stream = np.empty(stop - start + 1, dtype=np.int64)
    # stream[i] is the input of place start + i and the label of the place before it.
    opening, closing = int(start == 0), int(stop == num_tokens + 1)
    stream[0] = eos
    stream[-1] = eos
    stream[opening : len(stream) - closing] = text
    return Piece(stream[:-1], stream[1:])


def join_pieces(
    index: int, source: str, epoch: int, pieces: Sequence[Piece], document_ids: Sequence[str]
) -> Sample:
    """Returns the sample of pieces that follow each other in the stream."""
    return Sample(
        index=index,
        source=source,
        epoch=epoch,
        tokens_T=np.concatenate([piece.tokens_T for piece in pieces]),
        labels_T=np.concatenate([piece.labels_T for piece in pieces]),
        cu_seqlens=_ends([len(piece.tokens_T) for piece in pieces]),
        document_ids=tuple(document_ids),
    )


def pack_samples(samples: Sequence[Sample], slots: Sequence[int], seq_len: int) -> PackedBatch:
    """Packs samples into one micro-batch.

    Args:
        samples: at most seq_len tokens each, at least one sample.
        slots: place of each sample in the global batch.
        seq_len: tokens of a full sample.

    Returns:
        The micro-batch; token_index_T = slot * seq_len + position in the sample.
    """
    lengths = [np.diff(sample.cu_seqlens) for sample in samples]
    index = [
        slot * seq_len + np.arange(len(sample.tokens_T), dtype=np.int64)
        for slot, sample in zip(slots, samples, strict=True)
    ]
    return PackedBatch(
        tokens_T=np.concatenate([sample.tokens_T for sample in samples]),
        labels_T=np.concatenate([sample.labels_T for sample in samples]),
        cu_seqlens=_ends(np.concatenate(lengths)),
        token_index_T=np.concatenate(index),
        sample_ids=tuple(sample.index for sample in samples),
        sample_digests=tuple(sample_digest(sample) for sample in samples),
    )


def _ends(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
