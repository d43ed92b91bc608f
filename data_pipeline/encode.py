"""Documents to tokens, in order, by this process or by several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.documents import TextDocument
from data_pipeline.tokenizer import Tokenizer, decode_tokenizer

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024
WAITING_BATCHES = 4
"""Batches handed to each worker ahead of the writer; bounds the memory."""

_worker_tokenizer: Tokenizer | None = None


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest unsigned type, 16 or 32 bits, that holds every token."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_documents(
    documents: Iterable[TextDocument], tokenizer: Tokenizer, workers: int = 1
) -> Iterator[tuple[TextDocument, np.ndarray]]:
    """Yields each document with its tokens, in the order given, whatever the number of workers.

    Args:
        documents: read as needed, a bounded number ahead.
        tokenizer: encodes the text alone.
        workers: 1 encodes here (the library uses all cores); more starts that many processes,
            which pays where turning the tokens into arrays is the bottleneck.
    """
    if workers == 1:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            dtype = token_dtype(tokenizer.vocab_size)
            for document, ids in zip(batch, encoded, strict=True):
                yield document, np.array(ids, dtype=dtype)
        return
    # spawn: the tokenizers library keeps threads, which a fork would lose while it holds locks.
    # Contents and not only the path: the file may be gone by the time a worker starts.
    given = (tokenizer.contents, tokenizer.path)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, given)
    waiting: deque[tuple[list[TextDocument], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            waiting.append((batch, pool.submit(_encode_in_worker, texts)))
            if len(waiting) >= workers * WAITING_BATCHES:
                yield from _next_result(waiting)
        while waiting:
            yield from _next_result(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _next_result(
    waiting: deque[tuple[list[TextDocument], Future[list[np.ndarray]]]],
) -> Iterator[tuple[TextDocument, np.ndarray]]:
    batch, future = waiting.popleft()
    yield from zip(batch, future.result(), strict=True)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker(contents: bytes, path: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = decode_tokenizer(contents, path)


def _encode_in_worker(texts: Sequence[str]) -> list[np.ndarray]:
    if _worker_tokenizer is None:
        raise AssertionError("the worker has no tokenizer")
    dtype = token_dtype(_worker_tokenizer.vocab_size)
    # One by one: encode_batch would start a thread per core in every worker.
    return [np.array(_worker_tokenizer.encode(text), dtype=dtype) for text in texts]
