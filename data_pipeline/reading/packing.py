"""Pieces of documents to samples, samples to packed micro-batches.

With t the n tokens of a document, its stream is: inputs [eos, t1..tn], labels [t1..tn, eos], n + 1
places. A piece is a stretch of that stream. The label of a piece's last place is the true next
token, also where a window cuts the document there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from data_pipeline.reading.batch import PackedBatch, Sample, Skipped

EMPTY_DOCUMENT = "empty document in place of damaged bytes"
"""Id of what stands for a sample of which nothing could be read."""


@dataclass(slots=True)
class Window:
    """A sample as it is read: tokens as they are stored, neither joined nor widened."""

    number: int
    """Sample number of the run."""
    source: str
    """Name of its source."""
    epoch: int
    """Epoch of that source."""
    dtype: np.dtype[Any]
    """Of the tokens as they are stored, uint16 or uint32."""
    inputs: list[bytes] = field(default_factory=list)
    """Joined, they are the inputs. Bytes, for arrays of a few tokens cost more than their copy."""
    last_labels: list[bytes] = field(default_factory=list)
    """One token per piece: the label of its last place. Every other label is the next input."""
    lengths: list[int] = field(default_factory=list)
    """Places of each piece."""
    document_ids: list[str] = field(default_factory=list)
    """One per piece; empty where they were not asked for."""
    skipped: list[Skipped] = field(default_factory=list)
    """What is left out."""

    def add(self, text: bytes, opens: bool, closes: bool, eos: bytes) -> None:
        """Adds a piece.

        Args:
            text: the tokens that its inputs and labels are made of: t[a..b] where the piece covers
                the places from a + 1 on, or from 0 where it opens.
            opens: whether it begins with the document's end-of-text input.
            closes: whether it ends with the document's end-of-text label.
            eos: the end-of-text token, stored like the text.
        """
        size = len(eos)
        if opens:
            self.inputs.append(eos)
        # A piece that goes on gives its last token as a label only: the next piece has it as input.
        self.inputs.append(text if closes else text[:-size])
        self.last_labels.append(eos if closes else text[-size:])
        self.lengths.append(len(text) // size - 1 + opens + closes)

    def add_empty_document(self, eos: bytes) -> None:
        """Adds a document without text: one place, whose input and label is end-of-text."""
        self.add(b"", True, True, eos)
        self.document_ids.append(EMPTY_DOCUMENT)


def make_sample(window: Window) -> Sample:
    """Returns a window as a sample of int64 tokens."""
    tokens_T, labels_T, cu_seqlens = _joined([window])
    return Sample(
        index=window.number,
        source=window.source,
        epoch=window.epoch,
        tokens_T=tokens_T,
        labels_T=labels_T,
        cu_seqlens=cu_seqlens,
        document_ids=tuple(window.document_ids),
        skipped=tuple(window.skipped),
    )


def pack_windows(windows: Sequence[Window], slots: Sequence[int], seq_len: int) -> PackedBatch:
    """Packs windows into one micro-batch.

    Args:
        windows: at most seq_len places each, at least one window, all of one dtype.
        slots: place of each in the global batch.
        seq_len: places of a full window.

    Returns:
        The micro-batch; token_index_T = slot * seq_len + position in the window.
    """
    sizes = [sum(window.lengths) for window in windows]
    tokens_T, labels_T, cu_seqlens = _joined(windows)
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        cu_seqlens=cu_seqlens,
        token_index_T=token_index(slots, sizes, seq_len),
        sample_ids=tuple([window.number for window in windows]),
        sample_ends=tuple(accumulate(sizes)),
    )


def token_index(slots: Sequence[int], sizes: Sequence[int], seq_len: int) -> np.ndarray:
    """Returns slot * seq_len + position of every place of a micro-batch, int64 (T,).

    Args:
        slots: place of each sample in the global batch.
        sizes: places of each sample, <= seq_len.
        seq_len: places of a full sample.
    """
    return np.concatenate(
        [
            # By slot and not by sample: random draws of a token are keyed by its place in the
            # global batch.
            np.arange(slot * seq_len, slot * seq_len + size, dtype=np.int64)
            for slot, size in zip(slots, sizes, strict=True)
        ]
    )


def _joined(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs and labels, int64 (T,), and where the pieces begin, int32 (S + 1,)."""
    dtype = windows[0].dtype
    lengths = [length for window in windows for length in window.lengths]
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    inputs = b"".join([part for window in windows for part in window.inputs])
    last_labels = b"".join([label for window in windows for label in window.last_labels])
    tokens_T = np.frombuffer(inputs, dtype).astype(np.int64)
    labels_T = np.empty_like(tokens_T)
    # Right inside of each piece and wrong at its last place, which the next line sets.
    labels_T[:-1] = tokens_T[1:]
    labels_T[cu_seqlens[1:] - 1] = np.frombuffer(last_labels, dtype)
    return tokens_T, labels_T, cu_seqlens
