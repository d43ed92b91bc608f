"""Batches of pieces to ready tar records, or to digests of their texts; here or in many processes.

A batch is a function of its pieces alone, and results come in the order of the batches: nothing
depends on the number of processes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import EMPTY, empty_document, piece_documents
from data_pipeline.prepare.formats.format import Piece, TextDocument
from data_pipeline.prepare.round_trip import altered_texts, describe_change, is_equivalent
from data_pipeline.shard_format.records import encode_record
from data_pipeline.shard_format.table import DOCUMENT_DTYPE
from data_pipeline.tokenizer import Tokenizer, decode_tokenizer

BATCH_BYTES = 1 << 20
BATCH_PIECES = 1024
WAITING_BATCHES = 4
"""Batches handed to each worker ahead of the writer; bounds the memory."""

DUPLICATE = "duplicates"
TOO_SHORT = "too short"
TOO_LONG = "too long"
DIGEST_BYTES = 16

Result = TypeVar("Result")


class Batch(NamedTuple):
    """What is handed to a worker at once."""

    part: int
    """Number of the part; names its records."""
    pieces: tuple[Piece, ...]
    duplicates: frozenset[int]
    """Numbers of records in the part that repeat an earlier text."""
    is_last: bool
    """Whether the part ends with it."""


class EncodedBatch(NamedTuple):
    """The documents of a batch that are kept, and what became of the others."""

    contents: bytes
    """Their tar records."""
    rows: np.ndarray
    """DOCUMENT_DTYPE (num_documents,): offsets count from the beginning of `contents`."""
    numbers: np.ndarray
    """int64 (num_documents,): numbers of their records in the part."""
    checksums: np.ndarray
    """uint32, those of all documents one after the other."""
    checksum_ends: np.ndarray
    """int64 (num_documents,): where those of each document end."""
    domains: tuple[str, ...]
    """Names by the number in the rows."""
    max_token_id: int
    altered: np.ndarray
    """bool (num_documents,): whose tokens spell another text."""
    left_out: tuple[tuple[int, str], ...]
    """Number of the record and the reason, in the order of the numbers."""


class TextDigests(NamedTuple):
    """The texts of a batch by digest."""

    digests: bytes
    """DIGEST_BYTES for each."""
    numbers: np.ndarray
    """int64 (num_texts,): numbers of their records in the part."""


@dataclass(frozen=True)
class DocumentRules:
    """Which documents are kept, and what those are called that do not say it."""

    domain: str | None = None
    """Domain of documents that name none; None means "code" in source trees, else "text"."""
    skip_empty: bool = False
    """Leave out documents without tokens instead of refusing them."""
    min_tokens: int | None = None
    """Leave out documents with fewer tokens."""
    max_tokens: int | None = None
    """Leave out documents with more tokens."""
    allow_altered: bool = False
    """Keep documents whose tokens spell another text."""

    def reason_against(self, num_tokens: int) -> str:
        if self.min_tokens is not None and num_tokens < self.min_tokens:
            return TOO_SHORT
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            return TOO_LONG
        return ""


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest unsigned type, 16 or 32 bits, that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def make_batches(
    part: int, pieces: Iterable[Piece], duplicates: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields the pieces of a part in batches of about BATCH_BYTES, the last of them marked.

    Args:
        part: its number.
        pieces: read as needed.
        duplicates: sorted int64: numbers of records to leave out as repeated.
    """
    repeated = np.empty(0, dtype=np.int64) if duplicates is None else duplicates
    waiting: list[Piece] = []
    size = 0

    def batch(is_last: bool) -> Batch:
        bounds = (waiting[0].start.number, waiting[-1].end_number) if waiting else (0, 0)
        # Sorted numbers: those of a batch are one slice, so that a worker gets few of them.
        first, end = np.searchsorted(repeated, bounds)
        return Batch(part, tuple(waiting), frozenset(repeated[first:end].tolist()), is_last)

    for piece in pieces:
        # Before the piece is added, so that the batch that is marked as the last holds some.
        if size >= BATCH_BYTES or len(waiting) >= BATCH_PIECES:
            yield batch(is_last=False)
            waiting, size = [], 0
        waiting.append(piece)
        size += len(piece.contents)
    yield batch(is_last=True)


def encode_batch(batch: Batch, tokenizer: Tokenizer, rules: DocumentRules) -> EncodedBatch:
    """Returns the tar records of a batch.

    Raises:
        InputError: a flaw of the input; names file and line.
    """
    left_out: list[tuple[int, str]] = []
    numbered = list(_kept_texts(batch, rules, left_out))
    # All at once: the library encodes a batch in its own threads, outside of Python.
    encoded = tokenizer.encode_batch([document.text for _, document in numbered])
    kept: list[tuple[int, TextDocument, np.ndarray]] = []
    dtype = token_dtype(tokenizer.vocab_size)
    for (number, document), ids in zip(numbered, encoded, strict=True):
        # A tokenizer may make nothing of a text that is not empty.
        if not ids and not rules.skip_empty:
            raise empty_document(document)
        reason = rules.reason_against(len(ids)) if ids else EMPTY
        if reason:
            left_out.append((number, reason))
        else:
            kept.append((number, document, np.array(ids, dtype=dtype)))
    _check_tokens(kept, tokenizer, rules)
    return join_records(batch.part, kept, tuple(sorted(left_out)))


def _check_tokens(
    kept: list[tuple[int, TextDocument, np.ndarray]], tokenizer: Tokenizer, rules: DocumentRules
) -> None:
    """Marks documents whose tokens spell another text.

    Raises:
        InputError: a text that says end of text, or one that may not be altered.
    """
    for _, document, tokens in kept:
        if (tokens == tokenizer.eos_id).any():
            raise InputError(
                f"{document.origin}: document {document.id!r} has the end of text, token "
                f"{tokenizer.eos_id}, among its tokens; mend the tokenizer {tokenizer.path}"
            )
    texts = [document.text for _, document, _ in kept]
    found = altered_texts(tokenizer, texts, [tokens for _, _, tokens in kept])
    for at, back in found.items():
        number, document, tokens = kept[at]
        if not (rules.allow_altered or is_equivalent(document.text, back)):
            raise InputError(
                f"{document.origin}: document {document.id!r}: "
                f"{describe_change(document.text, back)}; take a tokenizer that keeps all of a "
                "text, remove the document, or pass --allow-altered",
                key="--allow-altered",
            )
        # What a model never sees counts for no bits per byte.
        num_bytes = len(back.encode("utf-8"))
        kept[at] = number, replace(document, num_bytes=num_bytes, altered=True), tokens


def _kept_texts(
    batch: Batch, rules: DocumentRules, left_out: list[tuple[int, str]]
) -> Iterator[tuple[int, TextDocument]]:
    for piece in batch.pieces:
        for number, found in piece_documents(piece, rules.domain):
            if not isinstance(found, TextDocument):
                left_out.append((number, found))
            elif number in batch.duplicates:
                left_out.append((number, DUPLICATE))
            elif found.text:
                yield number, found
            elif rules.skip_empty:
                left_out.append((number, EMPTY))
            else:
                raise empty_document(found)


def join_records(
    part: int,
    documents: Iterable[tuple[int, TextDocument, np.ndarray]],
    left_out: tuple[tuple[int, str], ...] = (),
) -> EncodedBatch:
    """Returns the records of documents one after the other.

    Args:
        part: number of the part they are in.
        documents: number of the record in its part, document, tokens; unsigned (num_tokens,).
        left_out: handed on.
    """
    contents: list[bytes] = []
    rows: list[tuple[int, ...]] = []
    numbers: list[int] = []
    checksums: list[np.ndarray] = []
    altered: list[bool] = []
    domains: dict[str, int] = {}
    size = max_token_id = 0
    for number, document, tokens in documents:
        metadata: dict[str, object] = {
            "id": document.id,
            "domain": document.domain,
            "source": document.source,
            "num_bytes": document.num_bytes,
            "num_tokens": len(tokens),
        }
        # The number in the part, not in the shard: the key does not depend on where a shard ends.
        record = encode_record(f"{part:06d}-{number:012d}", metadata, tokens)
        # Numbered as they appear: the same documents give the same table, in any process.
        domain = domains.setdefault(document.domain, len(domains))
        at = size + record.tokens_at
        rows.append((size, at, len(tokens), document.num_bytes, record.metadata_bytes, domain))
        contents.append(record.contents)
        checksums.append(record.checksums)
        numbers.append(number)
        altered.append(document.altered)
        size += len(record.contents)
        max_token_id = max(max_token_id, int(tokens.max()))
    return EncodedBatch(
        contents=b"".join(contents),
        rows=np.array(rows, dtype=DOCUMENT_DTYPE),
        numbers=np.array(numbers, dtype=np.int64),
        checksums=np.concatenate([np.empty(0, dtype="<u4"), *checksums]),
        checksum_ends=np.cumsum([len(own) for own in checksums], dtype=np.int64),
        domains=tuple(domains),
        max_token_id=max_token_id,
        altered=np.array(altered, dtype=bool),
        left_out=left_out,
    )


def digest_batch(batch: Batch, tokenizer: Tokenizer, rules: DocumentRules) -> TextDigests:
    """Returns the digest of each text of a batch that is not empty.

    Args:
        batch: its pieces.
        tokenizer: not used; what `Encoders.map` runs has one signature.
        rules: whether empty documents are left out.

    Raises:
        InputError: a flaw of the input; names file and line.
    """
    # Empty texts are left out here as they are in encoding, or they would be duplicates of each
    # other.
    texts = list(_kept_texts(batch, rules, []))
    digests = (
        hashlib.blake2b(document.text.encode("utf-8"), digest_size=DIGEST_BYTES).digest()
        for _, document in texts
    )
    numbers = np.array([number for number, _ in texts], dtype=np.int64)
    return TextDigests(b"".join(digests), numbers)


Work = Callable[[Batch, Tokenizer, DocumentRules], Result]


class Encoders:
    """Runs work on batches in order, here or in processes; a context manager."""

    def __init__(self, tokenizer: Tokenizer, rules: DocumentRules, workers: int) -> None:
        """Starts no process yet; with one worker there is none, the library's threads do it."""
        self._tokenizer, self._rules, self._workers = tokenizer, rules, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes; what they have begun is not waited for longer than a batch."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Work[Result], batches: Iterable[Batch]) -> Iterator[tuple[Batch, Result]]:
        """Yields each batch with its result, in order; of several errors the first in that order.

        Args:
            work: a function of this module.
            batches: read as needed, a bounded number ahead.

        Raises:
            InputError: a flaw of the input.
            RuntimeError: a process died.
        """
        if self._workers == 1:
            for batch in batches:
                yield batch, work(batch, self._tokenizer, self._rules)
            return
        pool = self._pool = self._pool or self._start()
        waiting: deque[tuple[Batch, Future[Result]]] = deque()
        failure: list[Exception] = []
        try:
            for batch in _until_failure(batches, failure):
                waiting.append((batch, pool.submit(_work_in_worker, work, batch)))
                # Results are taken in order, so that a slow batch holds up the rest; this many may
                # wait for it.
                if len(waiting) >= self._workers * WAITING_BATCHES:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "an encoding process ended without a word, mostly for want of memory; start the "
                "same command again with fewer --workers: it goes on where it was"
            ) from error
        # Only now: an earlier batch may hold a flaw that comes first in the input.
        if failure:
            raise failure[0]

    def _start(self) -> ProcessPoolExecutor:
        # spawn: the tokenizers library keeps threads, which a fork would lose while it holds locks.
        # Contents and not only the path: the file may be gone by the time a worker starts.
        given = (self._tokenizer.contents, self._tokenizer.path, self._rules)
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._workers, context, _start_worker, given)


def _until_failure(batches: Iterable[Batch], failure: list[Exception]) -> Iterator[Batch]:
    """Yields batches until reading fails; what was read before may hold an earlier flaw."""
    try:
        yield from batches
    except Exception as error:
        failure.append(error)


def _first(waiting: deque[tuple[Batch, Future[Result]]]) -> tuple[Batch, Result]:
    batch, future = waiting.popleft()
    return batch, future.result()


_worker: tuple[Tokenizer, DocumentRules] | None = None


def _start_worker(contents: bytes, path: Path, rules: DocumentRules) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work and says so once
    # A worker is one of many: the library would start a thread per core in each of them.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    threading.Thread(target=_follow_parent, daemon=True).start()
    _worker = decode_tokenizer(contents, path), rules


def _follow_parent() -> None:
    """Ends this process when its parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_in_worker(work: Work[Result], batch: Batch) -> Result:
    if _worker is None:
        raise AssertionError("the worker has no tokenizer")
    return work(batch, *_worker)
