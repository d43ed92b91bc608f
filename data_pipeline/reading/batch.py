"""What the loader hands to training. T: tokens of a packed micro-batch, S: documents in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Skipped:
    """Places of a sample that were left out because their bytes are damaged."""

    sample: int
    """Sample number of the run."""
    source: str
    """Name of the source."""
    shard: str
    """Name of the shard."""
    document: int | None
    """Row of the shard's document table; None: the whole stretch of the shard."""
    num_tokens: int
    """Places left out."""
    reason: str
    """What is wrong with the bytes."""


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
    skipped: tuple[Skipped, ...] = ()
    """What is left out of it."""


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
    sample_ends: tuple[int, ...]
    """Where each sample ends; the last is T."""

    @property
    def num_tokens(self) -> int:
        """Positions of the micro-batch; each has a label."""
        return len(self.token_index_T)

    @cached_property
    def sample_digests(self) -> tuple[bytes, ...]:
        """One per sample, see sample_digest; computed when a step is logged."""
        starts = (0, *self.sample_ends)
        return tuple(
            sample_digest(number, self.tokens_T[start:stop])
            for number, start, stop in zip(self.sample_ids, starts, self.sample_ends, strict=False)
        )


@dataclass(frozen=True)
class StepBatch:
    """What one data-parallel rank trains on in one optimizer step."""

    micro_batches: tuple[PackedBatch, ...]
    first_sample: int
    """Sample number of slot 0 of the global batch."""
    skipped: tuple[Skipped, ...] = ()
    """What is left out of this rank's samples."""

    @property
    def sample_digests(self) -> tuple[bytes, ...]:
        """Of this rank's samples in slot order."""
        return tuple(digest for batch in self.micro_batches for digest in batch.sample_digests)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.micro_batches)


def sample_digest(number: int, tokens_T: np.ndarray) -> bytes:
    """Returns sha256(sample number as int64 LE + tokens as int32 LE)."""
    # The number too: two samples of equal tokens must not be exchangeable.
    digest = hashlib.sha256(number.to_bytes(8, "little", signed=True))
    # One width and one byte order, whatever the shards store.
    digest.update(tokens_T.astype("<i4").data)
    return digest.digest()


def batch_digest(sample_digests: Iterable[bytes]) -> str:
    """Returns the hex sha256 of the digests of a global batch, given in slot order."""
    return hashlib.sha256(b"".join(sample_digests)).hexdigest()
