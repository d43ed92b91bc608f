"""Ways to read the same tokens: ours, stock webdataset, bare reads, a memory-mapped file, Mosaic.

Every way is a Work: it reads some tokens, goes on there the next time, and begins anew at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import Work
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.packing import pack_windows
from data_pipeline.reading.samples import SampleReader
from data_pipeline.reading.shards import open_documents
from data_pipeline.shard_format.index import ShardIndex
from data_pipeline.storage.interface import StoredFile

MICRO_BATCH_TOKENS = 16384
_BLOCK_BYTES = 1 << 20


def config_for(folder: str, seq_len: int) -> DataConfig:
    """Returns the configuration of a run that trains on one folder."""
    return DataConfig(train=(SourceConfig(folder),), seq_len=seq_len, seed=0)


class KeptReader(SampleReader):
    """A reader whose files and tables outlive a loader, as they do in a run."""

    def close(self) -> None:
        """Keeps everything."""


def packed_windows(folder: str, seq_len: int, tokens: int) -> Work:
    """Ours, what each thread of the loader does: windows read and packed into micro-batches."""
    reader = SampleReader(config_for(folder, seq_len))
    size, next_sample = MICRO_BATCH_TOKENS // seq_len, 0

    def work() -> int:
        nonlocal next_sample
        done = 0
        while done < tokens:
            windows = [reader.window(next_sample + slot) for slot in range(size)]
            done += pack_windows(windows, range(size), seq_len).num_tokens
            next_sample += size
        return done

    return work


def step_loader(folder: str, seq_len: int, tokens: int) -> Work:
    """Ours, the whole loader with its threads; what it has read ahead at the end is lost."""
    config = config_for(folder, seq_len)
    reader = KeptReader(config)
    micro_batch, next_sample = MICRO_BATCH_TOKENS // seq_len, 0
    size = 4 * micro_batch

    def work() -> int:
        nonlocal next_sample
        done = 0
        with contextlib.closing(
            StepLoader(
                config,
                global_batch_size=size,
                micro_batch_size=micro_batch,
                start_sample=next_sample,
                reader=reader,
            )
        ) as loader:
            while done < tokens:
                done += next(loader).num_tokens
                next_sample += size
        return done

    return work


def whole_samples(folder: str, seq_len: int, tokens: int) -> Work:
    """Ours, samples with the ids of their documents."""
    reader = SampleReader(config_for(folder, seq_len))
    next_sample = 0

    def work() -> int:
        nonlocal next_sample
        done = 0
        while done < tokens:
            done += len(reader.sample(next_sample).tokens_T)
            next_sample += 1
        return done

    return work


def endless(items: Callable[[], Iterator[np.ndarray]], tokens: int) -> Work:
    """Takes arrays from an iterator that is made again at its end."""
    current = items()

    def work() -> int:
        nonlocal current
        done = 0
        while done < tokens:
            item = next(current, None)
            if item is None:
                current = items()
            else:
                done += len(item)
        return done

    return work


def tar_paths(index: ShardIndex) -> list[str]:
    """Returns the shards as webdataset takes them."""
    return [str(Path(index.location) / shard.tar_name) for shard in index.shards]


def stock_documents(index: ShardIndex) -> Iterator[np.ndarray]:
    """Stock webdataset: one document after the other, as stored."""
    import webdataset

    for record in webdataset.WebDataset(tar_paths(index), shardshuffle=False).decode():
        yield record["npy"]


def stock_windows(index: ShardIndex, seq_len: int) -> Iterator[np.ndarray]:
    """Stock webdataset, documents joined and cut into windows: int64 (seq_len,) inputs."""
    parts: list[np.ndarray] = []
    size = 0
    eos = np.array([index.eos_id], dtype=index.token_dtype)
    for document in stock_documents(index):
        parts += [eos, document]
        size += 1 + len(document)
        if size <= seq_len:
            continue
        stream = np.concatenate(parts)
        starts = range(0, size - seq_len, seq_len)
        for start in starts:
            window = stream[start : start + seq_len + 1].astype(np.int64)
            _inputs, _labels = window[:-1], window[1:]
            yield _inputs
        parts = [stream[len(starts) * seq_len :]]
        size = len(parts[0])


class RecordingFile:
    """Passes reads on and notes them."""

    def __init__(self, file: StoredFile, path: str, reads: list[tuple[str, int, int]]) -> None:
        self._file, self._path, self._reads = file, path, reads

    def pread(self, size: int, offset: int) -> bytes:
        """Reads."""
        self._reads.append((self._path, size, offset))
        return self._file.pread(size, offset)


class RecordingStorage:
    """A shard folder whose shards note every read."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else is the folder's own."""
        return getattr(self._storage, name)

    def open(self, name: str, size: int, sha256: bytes) -> StoredFile:
        """Opens a shard."""
        opened = self._storage.open(name, size, sha256)
        return RecordingFile(opened, self._storage.path(name), self.reads)


def reads_of(folder: str, seq_len: int, num_samples: int) -> list[tuple[str, int, int]]:
    """Returns path, size and offset of every read that our first samples make, in their order."""
    reader = SampleReader(config_for(folder, seq_len))
    source = reader._sources[0]
    storage = RecordingStorage(source.reader.storage)
    source.reader.storage = storage
    for number in range(num_samples):
        reader.window(number)
    return storage.reads


def bare_reads(
    reads: Sequence[tuple[str, int, int]], tokens_of_reads: int, tokens: int, widen: bool
) -> Work:
    """The reads that ours makes and nothing else; with `widen`, their tokens as int64 besides.

    Args:
        reads: path, size, offset.
        tokens_of_reads: tokens of the samples that they were made for.
        tokens: of a piece of work.
        widen: whether to turn the bytes into int64 tokens.
    """
    files = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in reads}}
    plan = [(files[path], size, offset) for path, size, offset in reads]
    num_reads = round(len(plan) * tokens / tokens_of_reads)
    position = 0

    def work() -> int:
        nonlocal position
        left = num_reads
        while left:
            part = plan[position : position + left]
            if widen:
                for file, size, offset in part:
                    np.frombuffer(os.pread(file, size, offset), "<u2").astype(np.int64)
            else:
                for file, size, offset in part:
                    os.pread(file, size, offset)
            left -= len(part)
            position = (position + len(part)) % len(plan)
        return round(num_reads * tokens_of_reads / len(plan))

    return work


def whole_tars(index: ShardIndex, tokens: int) -> Work:
    """The tars from front to back in blocks of 1 MiB, table headers and padding included."""
    tokens_per_byte = index.num_tokens / int(index.shards.rows["tar_bytes"].sum())

    def blocks() -> Iterator[bytes]:
        while True:
            for path in tar_paths(index):
                with open(path, "rb", buffering=0) as tar:
                    while block := tar.read(_BLOCK_BYTES):
                        yield block

    source = blocks()

    def work() -> int:
        done = 0.0
        while done < tokens:
            done += len(next(source)) * tokens_per_byte
        return round(done)

    return work


class MappedTokens:
    """Megatron's GPT data set: one flat file of tokens, documents shuffled, windows shuffled."""

    def __init__(self, index: ShardIndex, folder: Path, seq_len: int) -> None:
        """Writes the flat file where it is not there yet and makes the three orders."""
        path = folder / "tokens.bin"
        self._lengths = write_flat_tokens(index, path)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._dtype = np.dtype(index.token_dtype)
        self._buffer = memoryview(np.memmap(path, mode="r", dtype=np.uint8))  # type: ignore[arg-type]
        random = np.random.default_rng(0)
        self._documents = random.permutation(len(self._lengths))
        ends = np.cumsum(self._lengths[self._documents])
        self._seq_len = seq_len
        windows = (int(ends[-1]) - 1) // seq_len
        places = np.arange(windows + 1) * seq_len
        turns = np.searchsorted(ends, places, side="right")
        offsets = places - (ends[turns] - self._lengths[self._documents[turns]])
        self._samples = np.stack([turns, offsets], axis=1)
        self._shuffled = random.permutation(windows)

    def __len__(self) -> int:
        """Windows of an epoch."""
        return len(self._shuffled)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and labels, int64 (seq_len,) each."""
        window = int(self._shuffled[number])
        first, start = self._samples[window]
        last, stop = self._samples[window + 1]
        if first == last:
            text = self._get(self._documents[first], start, stop - start + 1)
        else:
            parts = [self._get(self._documents[first], start, None)]
            parts += [self._get(self._documents[turn], 0, None) for turn in range(first + 1, last)]
            parts.append(self._get(self._documents[last], 0, stop + 1))
            text = np.concatenate(parts)
        wide = text.astype(np.int64)
        return wide[:-1], wide[1:]

    def _get(self, document: int, start: int, length: int | None) -> np.ndarray:
        if length is None:
            length = self._lengths[document] - start
        offset = (self._starts[document] + start) * self._dtype.itemsize
        return np.frombuffer(self._buffer, self._dtype, length, offset)

    def work(self, tokens: int) -> Work:
        """Reads window after window."""

        def inputs() -> Iterator[np.ndarray]:
            for number in range(len(self)):
                yield self[number][0]

        return endless(inputs, tokens)


def write_flat_tokens(index: ShardIndex, path: Path) -> np.ndarray:
    """Writes every document and an end-of-text token after it; returns their lengths, int64."""
    lengths = []
    eos = np.array([index.eos_id], dtype=index.token_dtype).tobytes()
    with path.open("wb") as flat:
        for document in open_documents(index.location):
            flat.write(document.tokens_T.astype(index.token_dtype).tobytes() + eos)
            lengths.append(len(document.tokens_T) + 1)
    return np.array(lengths, dtype=np.int64)


def has_mosaic() -> bool:
    """Whether mosaicml-streaming is installed."""
    return importlib.util.find_spec("streaming") is not None


def mosaic_windows(index: ShardIndex, folder: Path, seq_len: int, tokens: int) -> dict[str, Work]:
    """Mosaic's StreamingDataset over windows that were joined and cut beforehand, two ways.

    Returns:
        "mosaic streaming": its iterator, shuffled; "mosaic, by number": random access alone.
    """
    streaming = importlib.import_module("streaming")

    local = folder / f"mosaic-{seq_len}"
    columns = {"tokens": f"ndarray:{index.token_dtype}:{seq_len}"}
    with streaming.MDSWriter(out=str(local), columns=columns) as writer:
        for window in stock_windows(index, seq_len):
            writer.write({"tokens": window.astype(index.token_dtype)})
    windows = streaming.StreamingDataset(
        local=str(local),
        shuffle=True,
        batch_size=MICRO_BATCH_TOKENS // seq_len,
        predownload=1 << 20,  # all of it: with little ahead its iterator sleeps between samples
    )
    numbers = np.random.default_rng(0).permutation(windows.size)

    def shuffled() -> Iterator[np.ndarray]:
        for sample in windows:
            yield sample["tokens"].astype(np.int64)

    def by_number() -> Iterator[np.ndarray]:
        for number in numbers:
            yield windows[number]["tokens"].astype(np.int64)

    return {
        "mosaic streaming": endless(shuffled, tokens),
        "mosaic, by number": endless(by_number, tokens),
    }
