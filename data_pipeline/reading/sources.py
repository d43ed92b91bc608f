"""What a run must know of its sources before the first step; shards are looked at, not read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.errors import InputError
from data_pipeline.masking import masked
from data_pipeline.shard_format.index import Shard, ShardIndex, read_index
from data_pipeline.shard_format.tar import BLOCK_BYTES, is_header
from data_pipeline.storage.interface import Storage
from data_pipeline.storage.local import LocalFolder
from data_pipeline.storage.open import open_storage
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer, decode_tokenizer, load_tokenizer

CHECK_THREADS = 32  # a check waits for the file system, not for the processor


@dataclass(frozen=True)
class SourceSummary:
    """The sources of a run together."""

    tokenizer: Tokenizer
    """The one that all of them were prepared with."""
    train_tokens: int
    """Tokens of one epoch of every train source, as trained."""
    fingerprints: tuple[str, ...]
    """ShardIndex.fingerprint of each source, those of data.train first."""


@dataclass(frozen=True)
class DamagedShard:
    """A shard that is missing, cut or replaced at first sight."""

    split: str
    """"train" or "valid"."""
    source: int
    """Number of the source in its list."""
    shard: int
    """Number of the shard."""
    num_tokens: int
    """Stream tokens that it holds by the index."""
    problem: str
    """What is wrong, with the way out."""


def open_sources(data: DataConfig, vocab_size: int) -> SourceSummary:
    """Checks the shard folders of a run by their indexes and tokenizers; cheap for any size.

    Args:
        data: configuration of the run.
        vocab_size: model.vocab_size.

    Raises:
        InputError: the first thing found wrong.
        StorageError: the storage does not answer.
    """
    sources = (*data.train, *data.valid)
    if not sources:
        raise InputError(
            "data.train = [], must name a shard folder; add {path: FOLDER}", key="data.train"
        )
    storages = [open_storage(source.path, data.storage) for source in sources]
    indexes = [
        read_index(source.path, storage) for source, storage in zip(sources, storages, strict=True)
    ]
    # All against the first: tokens of one run mean the same in every source.
    first = indexes[0]
    for index in indexes:
        _check_tokenizer(index, first, vocab_size)
    # Every folder's own file is read: one whose tokenizer was exchanged would decode wrongly.
    tokenizers = [
        read_tokenizer(index, storage) for index, storage in zip(indexes, storages, strict=True)
    ]
    if data.tokenizer and load_tokenizer(Path(data.tokenizer)).sha256 != first.tokenizer_sha256:
        raise InputError(
            f"data.tokenizer = {data.tokenizer}: not the tokenizer {first.location} was prepared "
            "with; leave it out to use the one kept with the shards",
            key="data.tokenizer",
        )
    train = indexes[: len(data.train)]
    return SourceSummary(
        tokenizers[0],
        sum(index.num_stream_tokens for index in train),
        tuple(index.fingerprint for index in indexes),
    )


def read_tokenizer(index: ShardIndex, storage: Storage) -> Tokenizer:
    """Reads the tokenizer kept with the shards.

    Raises:
        InputError: it is missing, or not the one they were written with.
    """
    path = storage.path(TOKENIZER_FILE)
    try:
        contents = storage.read_bytes(TOKENIZER_FILE)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing; put the --tokenizer of this folder back there"
        ) from error
    if hashlib.sha256(contents).hexdigest() != index.tokenizer_sha256:
        raise InputError(
            f"{path}: not the tokenizer the shards were written with; put that one back"
        )
    tokenizer = decode_tokenizer(contents, Path(path))
    for key in ("vocab_size", "eos_id"):
        found, listed = getattr(tokenizer, key), getattr(index, key)
        if found != listed:
            raise InputError(
                f"{path}: {key} = {found}, the index says {listed}; prepare the folder again"
            )
    return tokenizer


def check_shards(data: DataConfig, part: int = 0, num_parts: int = 1) -> list[DamagedShard]:
    """Looks at every num_parts-th shard of a run: presence, size, first and last record.

    Bytes changed inside a shard are found when they are read, or by `megadlcm data verify`.

    Args:
        data: configuration of the run.
        part: which of them: 0 <= part < num_parts.
        num_parts: among how many processes the work is shared.

    Returns:
        Those that are not as the index says, in a fixed order.

    Raises:
        InputError: an unusable index.
        StorageError: the storage does not answer.
    """
    return list(_damaged_shards(data, part, num_parts))


def _damaged_shards(data: DataConfig, part: int, num_parts: int) -> Iterator[DamagedShard]:
    seen: dict[str, list[tuple[int, int, str]]] = {}
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for split in ("train", "valid"):
            for number, source in enumerate(data.sources(split)):
                storage = open_storage(source.path, data.storage)
                if source.path not in seen:  # a folder may serve twice
                    index = read_index(source.path, storage)
                    own = index.shards[part::num_parts]
                    problems = pool.map(lambda s, at=storage: shard_problem(at, s), own)
                    seen[source.path] = [
                        (shard.number, shard.num_stream_tokens, problem)
                        for shard, problem in zip(own, problems, strict=True)
                        if problem
                    ]
                for shard_number, size, problem in seen[source.path]:
                    advice = f"see `megadlcm data verify {source.path}` and prepare it again"
                    shown = masked(f"{problem}; {advice}")
                    yield DamagedShard(split, number, shard_number, size, shown)


def shard_problem(storage: Storage, shard: Shard) -> str:
    """Returns what is wrong with a shard at first sight, or an empty string."""
    path = storage.path(shard.tar_name)
    try:
        # Its size is in no index: its presence is all that can be seen without reading it.
        storage.size(shard.table_name)
    except FileNotFoundError:
        return f"{storage.path(shard.table_name)}: missing"
    try:
        size = storage.size(shard.tar_name)
        if size != shard.tar_bytes:
            return f"{path}: {size} bytes, {shard.tar_bytes} were written"
        if isinstance(storage, LocalFolder):  # elsewhere a look at a header costs a whole copy
            tar = storage.open(shard.tar_name, shard.tar_bytes, shard.tar_sha256)
            for offset in (0, shard.last_record):
                if not is_header(tar.pread(BLOCK_BYTES, offset)):
                    return f"{path}: no tar header at byte {offset}, where a record must begin"
    except FileNotFoundError:
        return f"{path}: missing"
    return ""


def _check_tokenizer(index: ShardIndex, first: ShardIndex, vocab_size: int) -> None:
    if index.tokenizer_sha256 != first.tokenizer_sha256:
        raise InputError(
            f"data: {index.location} and {first.location} were prepared with different "
            "tokenizers, one run has one; prepare them again with the same --tokenizer",
            key="data.train",
        )
    if index.max_token_id >= vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size}: {index.location} holds token {index.max_token_id}, "
            f"tokens must be below it; set model.vocab_size >= {index.max_token_id + 1}",
            key="model.vocab_size",
        )
