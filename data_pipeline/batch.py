"""What the loader hands to training. T: tokens of a packed micro-batch, S: documents in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One window of the stream: pieces of documents, each a document of its own to the model."""

    index: int
    """Sample number of the run."""
    source: str
    """Name of the source it comes from."""
    epoch: int
    """Epoch of that source."""
    tokens_T: np.ndarray
    """int64 (T,): inputs; a document opens with the end-of-text token."""
    labels_T: np.ndarray
    """int64 (T,): the next token of the same document, end-of-text at its end; always valid."""
    cu_seqlens: np.ndarray
    """int32 (S + 1,): where the pieces begin, and T."""
    document_ids: tuple[str, ...]
    """One per piece."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: samples one after the other, no padding."""

    tokens_T: np.ndarray
    """int64 (T,)."""
    labels_T: np.ndarray
    """int64 (T,)."""
    cu_seqlens: np.ndarray
    """int32 (S + 1,)."""
    token_index_T: np.ndarray
    """int64 (T,): slot * seq_len + position, the same whatever the split of the global batch."""
    sample_ids: tuple[int, ...]
    """Sample numbers of the run."""
    sample_digests: tuple[bytes, ...]
    """One per sample, see sample_digest."""

    @property
    def num_tokens(self) -> int:
        """Positions of the micro-batch; each has a label."""
        return len(self.tokens_T)


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank trains on in one optimizer step."""

    micro_batches: tuple[PackedBatch, ...]
    first_sample: int
    """Sample number of slot 0 of the global batch."""
    sample_digests: tuple[bytes, ...]
    """Of this rank's samples in slot order."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches of this rank."""
        return sum(batch.num_tokens for batch in self.micro_batches)


def sample_digest(sample: Sample) -> bytes:
    """Returns sha256(sample number as int64 LE + tokens as int32 LE)."""
    number = sample.index.to_bytes(8, "little", signed=True)
    return hashlib.sha256(number + sample.tokens_T.astype("<i4").tobytes()).digest()


def batch_digest(sample_digests: Iterable[bytes]) -> str:
    """Returns the hex sha256 of the digests of a global batch, given in slot order."""
    return hashlib.sha256(b"".join(sample_digests)).hexdigest()
