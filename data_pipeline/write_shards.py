"""Documents to a shard folder: tar shards, their document tables, tokenizer.json, index.json last.

The same documents and options give the same bytes. A folder without index.json is unfinished,
whatever else it holds. Everything is written to a subfolder and moved up when all of it is there:
what the folder held before outlives a prepare that fails.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.documents import (
    ReadCounts,
    TextDocument,
    empty_document,
    find_inputs,
    read_documents,
)
from data_pipeline.encode import encode_documents, token_dtype
from data_pipeline.errors import InputError
from data_pipeline.index import (
    INDEX_FILE,
    SHARD_DTYPE,
    DomainCounts,
    ShardIndex,
    ShardList,
    encode_index,
)
from data_pipeline.output_folder import make_output_folder, sync_folder, write_durably
from data_pipeline.progress import Progress
from data_pipeline.records import DOCUMENT_DTYPE, archive_end, encode_record, encode_table
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

UNFINISHED_FOLDER = ".unfinished"
OUR_FILES = re.compile(
    r"shard-\d{6,}\.(tar|documents\.npy)|tokenizer\.json|index\.json.*|shards\.npy"
)


@dataclass(frozen=True)
class PrepareOptions:
    """What `megadlcm data prepare` is asked to do."""

    inputs: tuple[str, ...]
    """File names, globs or directories, in reading order."""
    tokenizer: Path
    """Tokenizer file or folder."""
    output: Path
    """Shard folder to write."""
    shard_tokens: int = 10_000_000
    """Most text tokens of a shard; a longer document has a shard of its own."""
    domain: str | None = None
    """Domain of documents that name none; None means "code" in source trees, else "text"."""
    workers: int = 1
    """Processes that encode; the result does not depend on it."""
    skip_empty: bool = False
    """Leave out and count documents without tokens instead of refusing them."""
    overwrite: bool = False
    """Replace a finished shard folder, or another tokenizer.json in an unfinished one."""


def prepare(options: PrepareOptions) -> tuple[ShardIndex, ReadCounts]:
    """Writes a shard folder and returns its index and what was left out.

    Raises:
        InputError: wrong options, an unusable input, or a finished folder in the way.
    """
    for name in ("shard_tokens", "workers"):
        value = getattr(options, name)
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be >= 1; give a count")
    tokenizer = load_tokenizer(options.tokenizer)
    counts = ReadCounts()
    files = find_inputs(options.inputs, counts)
    _check_output(options, tokenizer)
    make_output_folder(options.output, "--output")
    documents = read_documents(files, counts, options.domain, options.skip_empty)
    total = sum(file.path.stat().st_size for file in files)
    with (
        closing(ShardFolderWriter(options.output, tokenizer, options.shard_tokens)) as writer,
        Progress("prepare", total, "tokens") as progress,
    ):
        for document, tokens in encode_documents(documents, tokenizer, options.workers):
            if len(tokens) == 0 and options.skip_empty:
                counts.skipped_empty += 1
                continue
            writer.add(document, tokens)
            progress.update(counts.done_bytes, writer.num_tokens)
        if writer.num_documents == 0:
            raise InputError(
                f"--input {' '.join(options.inputs)}: no documents in {len(files)} files "
                f"({counts.left_out or 'nothing left out'}); check the pattern"
            )
        progress.update(total, writer.num_tokens)
        return writer.finish(), counts


def _check_output(options: PrepareOptions, tokenizer: Tokenizer) -> None:
    """Raises InputError where the folder holds what only --overwrite may replace."""
    output, kept = options.output, options.output / TOKENIZER_FILE
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file, must be a folder; choose another name")
    if options.overwrite:
        return
    if (output / INDEX_FILE).exists():
        raise InputError(
            f"--output {output}: holds finished shards; choose another folder or pass --overwrite"
        )
    if kept.is_file() and kept.read_bytes() != tokenizer.contents:
        raise InputError(
            f"--output {output}: holds another {TOKENIZER_FILE} than --tokenizer "
            f"{options.tokenizer}; choose another folder or pass --overwrite"
        )


@dataclass
class _OpenShard:
    """A shard being written."""

    name: str
    file: BinaryIO
    size: int = 0
    num_tokens: int = 0
    rows: list[tuple[int, ...]] = field(default_factory=list)
    checksums: list[np.ndarray] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, contents: bytes) -> None:
        """Appends bytes to the tar."""
        self.file.write(contents)
        self.digest.update(contents)
        self.size += len(contents)


class ShardFolderWriter:
    """Writes documents to a subfolder, shard after shard; finish() makes them a shard folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        """Clears what a killed writer left; the rest of the folder stays as it is till finish()."""
        self.num_documents = 0
        self.num_tokens = 0
        self._folder = folder
        self._unfinished = folder / UNFINISHED_FOLDER
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._max_token_id = tokenizer.eos_id
        self._domains: dict[str, DomainCounts] = {}
        self._shards: list[tuple[int | bytes, ...]] = []
        self._open: _OpenShard | None = None
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._unfinished.mkdir(parents=True)

    def add(self, document: TextDocument, tokens: np.ndarray) -> None:
        """Writes one document.

        Args:
            document: its text is not stored, only what its tokens cannot tell.
            tokens: unsigned integer (num_tokens,), the text alone.

        Raises:
            InputError: a document without tokens.
        """
        if len(tokens) == 0:
            raise empty_document(document)
        if self._open and self._open.num_tokens + len(tokens) > self._shard_tokens:
            self._close_shard()
        shard = self._open or self._new_shard()
        metadata: dict[str, object] = {
            "id": document.id,
            "domain": document.domain,
            "source": document.source,
            "num_bytes": document.num_bytes,
            "num_tokens": len(tokens),
        }
        record = encode_record(f"{self.num_documents:012d}", metadata, tokens)
        earlier = self._domains.setdefault(document.domain, DomainCounts(0, 0, 0))
        domain = shard.domains.setdefault(document.domain, len(shard.domains))
        shard.rows.append(
            (
                shard.size,
                shard.size + record.tokens_at,
                len(tokens),
                document.num_bytes,
                record.metadata_bytes,
                domain,
            )
        )
        shard.checksums.append(record.checksums)
        shard.write(record.contents)
        shard.num_tokens += len(tokens)
        self.num_documents += 1
        self.num_tokens += len(tokens)
        self._max_token_id = max(self._max_token_id, int(tokens.max()))
        self._domains[document.domain] = earlier.plus(
            DomainCounts(1, len(tokens), document.num_bytes)
        )

    def finish(self) -> ShardIndex:
        """Adds tokenizer and index to the shards and puts all in the place of what was there."""
        if self._open:
            self._close_shard()
        write_durably(self._unfinished / TOKENIZER_FILE, self._tokenizer.contents)
        index = ShardIndex(
            location=str(self._folder),
            shards=ShardList(np.array(self._shards, dtype=SHARD_DTYPE)),
            domains=self._domains,
            tokenizer_sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            max_token_id=self._max_token_id,
            token_dtype=self._dtype.name,
        )
        for name, contents in encode_index(index).items():
            write_durably(self._unfinished / name, contents)
        self._publish()
        return index

    def close(self) -> None:
        """Removes what is unfinished; after finish() that is nothing."""
        if self._open:
            self._open.file.close()
            self._open = None
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)

    def _publish(self) -> None:
        """Moves the files up; the old index goes first and the new one comes last."""
        (self._folder / INDEX_FILE).unlink(missing_ok=True)
        sync_folder(self._folder)
        names = {path.name for path in self._unfinished.iterdir()} - {INDEX_FILE}
        for path in sorted(self._folder.iterdir()):
            if OUR_FILES.fullmatch(path.name) and path.name not in names:
                path.unlink()
        for name in sorted(names):
            os.replace(self._unfinished / name, self._folder / name)
        sync_folder(self._folder)
        os.replace(self._unfinished / INDEX_FILE, self._folder / INDEX_FILE)
        self._unfinished.rmdir()
        sync_folder(self._folder)

    def _new_shard(self) -> _OpenShard:
        name = f"shard-{len(self._shards):06d}"
        self._open = _OpenShard(name, open(self._unfinished / f"{name}.tar", "wb"))  # noqa: SIM115
        return self._open

    def _close_shard(self) -> None:
        shard = self._open
        if shard is None:
            raise AssertionError("no shard is open")
        shard.write(archive_end(shard.size))
        shard.file.flush()
        os.fsync(shard.file.fileno())
        shard.file.close()
        rows = np.array(shard.rows, dtype=DOCUMENT_DTYPE)
        table = encode_table(rows, np.concatenate(shard.checksums), list(shard.domains))
        write_durably(self._unfinished / f"{shard.name}.documents.npy", table)
        self._shards.append(
            (
                len(rows),
                shard.num_tokens,
                int(rows["num_bytes"].sum()),
                shard.size,
                int(rows["record_offset"][-1]),
                shard.digest.digest(),
                hashlib.sha256(table).digest(),
            )
        )
        self._open = None
