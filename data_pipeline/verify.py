"""Is a shard folder what was written? At first sight before a run, in every byte on demand."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.index import DomainCounts, Shard, ShardIndex
from data_pipeline.progress import Progress
from data_pipeline.records import (
    BLOCK_BYTES,
    DocumentTable,
    chunk_checksums,
    decode_table,
    is_tar_header,
)
from data_pipeline.tokenizer import TOKENIZER_FILE, decode_tokenizer

CHECK_THREADS = 32  # a check waits for the file system, not for the processor
HASH_BYTES = 1 << 22


def check_folder(index: ShardIndex) -> None:
    """Checks the files of a shard folder by presence, size and record headers.

    Raises:
        InputError: the first file that is missing, cut or replaced.
    """
    kept = index.folder / TOKENIZER_FILE
    if not kept.is_file():
        raise InputError(f"{kept}: missing; put the --tokenizer of this folder back there")
    if hashlib.sha256(kept.read_bytes()).hexdigest() != index.tokenizer_sha256:
        raise InputError(
            f"{kept}: not the tokenizer the shards were written with; put that one back"
        )
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for problem in pool.map(partial(shard_problem, index), index.shards):
            if problem:
                raise InputError(
                    f"{problem}; see `megadlcm data verify {index.folder}` and prepare it again"
                )


def shard_problem(index: ShardIndex, shard: Shard) -> str:
    """Returns what is wrong with a shard at first sight, or an empty string."""
    table, path = index.table_path(shard), index.tar_path(shard)
    for file in (table, path):
        if not file.is_file():
            return f"{file}: missing"
    size = path.stat().st_size
    if size != shard.tar_bytes:
        return f"{path}: {size} bytes, {shard.tar_bytes} were written"
    with open(path, "rb") as tar:
        for offset in (0, shard.last_record):
            tar.seek(offset)
            if not is_tar_header(tar.read(BLOCK_BYTES)):
                return f"{path}: no tar header at byte {offset}, where a record must begin"
    return ""


def verify_folder(index: ShardIndex) -> Iterator[str]:
    """Yields every problem of a shard folder, reading each byte of it.

    Checks the tokenizer, each shard's size and sha256, that each record can be read the way
    webdataset does and is the one its document table tells of, the counts of shards and domains,
    and that no shard lies beside those the index lists. Shows its progress.
    """
    yield from _tokenizer_problems(index)
    domains = dict.fromkeys(index.domains, DomainCounts(0, 0, 0))
    done = 0
    with Progress("verify", sum(shard.tar_bytes for shard in index.shards), "bytes") as progress:
        for shard in index.shards:
            problem = shard_problem(index, shard)
            if problem:
                yield problem
            else:
                yield from _shard_problems(index, shard, domains, progress, done)
            done += shard.tar_bytes
            progress.update(done, done)
    for name, counts in index.domains.items():
        if domains[name] != counts:
            found = tuple(domains[name])
            yield (
                f"{index.folder}: domain {name}: documents, tokens, bytes {found} differ from the "
                f"index, {tuple(counts)}"
            )
    listed = {shard.name for shard in index.shards}
    for path in sorted(index.folder.glob("shard-*.tar")):
        if path.stem not in listed:
            yield f"{path}: not in the index"


def _tokenizer_problems(index: ShardIndex) -> Iterator[str]:
    """Yields what is wrong with the tokenizer kept with the shards."""
    kept = index.folder / TOKENIZER_FILE
    if not kept.is_file():
        yield f"{kept}: missing"
        return
    contents = kept.read_bytes()
    if hashlib.sha256(contents).hexdigest() != index.tokenizer_sha256:
        yield f"{kept}: sha256 differs from the index"
        return
    try:
        tokenizer = decode_tokenizer(contents, kept)
    except InputError as error:
        yield str(error)
        return
    for key in ("vocab_size", "eos_id"):
        found, listed = getattr(tokenizer, key), getattr(index, key)
        if found != listed:
            yield f"{kept}: {key} = {found}, the index says {listed}"


def _shard_problems(
    index: ShardIndex,
    shard: Shard,
    domains: dict[str, DomainCounts],
    progress: Progress,
    earlier_bytes: int,
) -> Iterator[str]:
    """Yields the problems of a shard whose files are there in full size; counts its domains."""
    path, table_path = index.tar_path(shard), index.table_path(shard)
    if _file_sha256(index, shard) != shard.tar_sha256:
        yield f"{path}: sha256 differs from the index"
    contents = table_path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != shard.table_sha256:
        yield f"{table_path}: sha256 differs from the index"
        return
    table = decode_table(contents)
    totals = (len(table.rows), table.rows["num_tokens"].sum(), table.rows["num_bytes"].sum())
    if totals != (shard.num_documents, shard.num_tokens, shard.num_bytes):
        yield f"{table_path}: documents, tokens, bytes {totals} differ from the index"
    names = list(index.domains)
    number = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for number, row in enumerate(table.rows):
                name = names[row["domain"]]
                domains[name] = domains[name].with_document(
                    int(row["num_tokens"]), int(row["num_bytes"])
                )
                for what in _record_problems(index, tar, table, number):
                    yield f"{path}: document {number}: {what}"
                done = earlier_bytes + int(row["record_offset"])
                progress.update(done, done)
            if tar.next() is not None:
                yield f"{path}: more records than the {len(table.rows)} of the document table"
    except (tarfile.TarError, OSError, EOFError, IndexError) as error:
        yield f"{path}: document {number}: not readable ({error})"


def _record_problems(
    index: ShardIndex, tar: tarfile.TarFile, table: DocumentTable, number: int
) -> Iterator[str]:
    """Yields what is wrong with the next record of an open tar, reading as webdataset would."""
    row = table.rows[number]
    members = [tar.next(), tar.next()]
    if members[0] is None or members[1] is None:
        raise tarfile.ReadError("the tar ends before its last record")
    described, stored = members[0], members[1]
    key = described.name.removesuffix(".json")
    if (described.name, stored.name) != (f"{key}.json", f"{key}.npy"):
        yield f"members {described.name}, {stored.name} are not one record"
        return
    if described.offset != row["record_offset"]:
        yield f"begins at byte {described.offset}, the table says {row['record_offset']}"
    try:
        metadata = json.loads(_contents(tar, described))
        tokens = np.load(BytesIO(_contents(tar, stored)), allow_pickle=False)
    except ValueError as error:
        yield f"not readable ({error})"
        return
    domain = list(index.domains)[row["domain"]]
    expected = {"num_bytes": row["num_bytes"], "num_tokens": row["num_tokens"], "domain": domain}
    for name, value in expected.items():
        if metadata.get(name) != value:
            yield f"{name} = {metadata.get(name)}, the table says {value}"
    if tokens.shape != (row["num_tokens"],) or tokens.dtype != np.dtype(index.token_dtype):
        yield f"tokens {tokens.dtype} {tokens.shape}, must be {index.token_dtype}"
    elif tokens.max() > index.max_token_id:
        yield f"token {tokens.max()} above the largest of the index, {index.max_token_id}"
    at = table.first_checksum[number]
    found = chunk_checksums(tokens.tobytes(), tokens.itemsize)
    if not np.array_equal(found, table.checksums[at : at + len(found)]):
        yield "its tokens are not those written (checksum)"


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no regular file")
    return file.read()


def _file_sha256(index: ShardIndex, shard: Shard) -> str:
    digest = hashlib.sha256()
    with open(index.tar_path(shard), "rb") as tar:
        while part := tar.read(HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()
