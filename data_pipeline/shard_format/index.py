"""index.json of a shard folder and the table of its shards; read without opening a shard.

index.json says what the folder holds as a whole and is written last; `shards.npy` beside it has a
row of SHARD_DTYPE per shard, 104 bytes each, so that 100,000 shards are 10 MB and read at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shard_format.array import load_array, save_array
from data_pipeline.storage.interface import Location, Storage
from data_pipeline.storage.open import open_storage

INDEX_FILE = "index.json"
SHARDS_FILE = "shards.npy"
FORMAT = "webdataset-token-shards"
VERSION = 2
TOKEN_DTYPES = ("uint16", "uint32")
_TEXTS = ("shards_sha256", "tokenizer_sha256", "token_dtype")

SHARD_DTYPE = np.dtype(
    [
        ("num_documents", "<i8"),
        ("num_tokens", "<i8"),  # of the texts; no end-of-text tokens are stored
        ("num_bytes", "<i8"),  # of the texts in UTF-8
        ("tar_bytes", "<i8"),
        ("last_record", "<i8"),  # offset of the last record's first tar header
        ("tar_sha256", "V32"),
        ("table_sha256", "V32"),
    ]
)


_SHARD_FILE = re.compile(r"shard-(\d{6,})\.(?:tar|documents\.npy)")


def shard_number(file_name: str) -> int | None:
    """Returns the number of the shard that a file of a folder belongs to, None where to none."""
    found = _SHARD_FILE.fullmatch(file_name)
    return int(found[1]) if found else None


def shard_name(number: int) -> str:
    """Returns what the files of a shard are called after."""
    return f"shard-{number:06d}"


def tar_name(number: int) -> str:
    """Returns the file name of a shard's tar."""
    return f"{shard_name(number)}.tar"


def table_name(number: int) -> str:
    """Returns the file name of a shard's document table."""
    return f"{shard_name(number)}.documents.npy"


class Shard(NamedTuple):
    """One tar file and the document table beside it."""

    number: int
    """Row in the table of the shards; the files are called after it."""
    num_documents: int
    num_tokens: int
    """Text tokens; no end-of-text tokens are stored."""
    num_bytes: int
    """UTF-8 bytes of the texts."""
    tar_bytes: int
    """Size of the tar file."""
    last_record: int
    """Offset of the last record's first tar header."""
    tar_sha256: bytes
    """32 bytes."""
    table_sha256: bytes
    """32 bytes."""

    @property
    def name(self) -> str:
        """File name without ending: NAME.tar and NAME.documents.npy."""
        return shard_name(self.number)

    @property
    def tar_name(self) -> str:
        return tar_name(self.number)

    @property
    def table_name(self) -> str:
        return table_name(self.number)

    @property
    def num_stream_tokens(self) -> int:
        """Places in the stream: a document of n tokens takes n + 1."""
        return self.num_tokens + self.num_documents


class ShardList(Sequence[Shard]):
    """The shards of a folder; a Shard is made when it is asked for."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self.rows)))]
        at = range(len(self.rows))[number]
        return Shard(at, *self.rows[at].item())

    def __iter__(self) -> Iterator[Shard]:
        for number, row in enumerate(self.rows):
            yield Shard(number, *row.item())


class DomainCounts(NamedTuple):
    """What one domain holds."""

    documents: int
    tokens: int
    bytes: int

    def plus(self, other: DomainCounts) -> DomainCounts:
        return DomainCounts(*(mine + its for mine, its in zip(self, other, strict=True)))


def count_domain(totals: dict[str, DomainCounts], name: str, counts: DomainCounts) -> None:
    """Adds counts to those of a domain, which may be new."""
    totals[name] = totals[name].plus(counts) if name in totals else counts


@dataclass(frozen=True)
class ShardIndex:
    """What is in a finished shard folder."""

    location: str
    """Folder, or URL of one."""
    shards: ShardList
    domains: Mapping[str, DomainCounts]
    """By name."""
    tokenizer_sha256: str
    """Digest of the tokenizer.json in the folder."""
    vocab_size: int
    """Of the tokenizer: one more than its largest id."""
    eos_id: int
    max_token_id: int
    """Largest id a reader meets, eos included."""
    token_dtype: str
    """numpy name of the stored tokens."""

    @cached_property
    def num_documents(self) -> int:
        return int(self.shards.rows["num_documents"].sum())

    @cached_property
    def num_tokens(self) -> int:
        return int(self.shards.rows["num_tokens"].sum())

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.shards.rows["num_bytes"].sum())

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of one epoch as trained: every text token and one end-of-text per document."""
        return self.num_tokens + self.num_documents

    @property
    def shard_stream_tokens(self) -> np.ndarray:
        """int64 (num_shards,): stream tokens of each shard."""
        sums: np.ndarray = self.shards.rows["num_tokens"] + self.shards.rows["num_documents"]
        return sums

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of every byte of the shards and of the tokenizer, wherever they lie."""
        digest = hashlib.sha256(self.tokenizer_sha256.encode())
        digest.update(np.ascontiguousarray(self.shards.rows["tar_sha256"]).tobytes())
        return digest.hexdigest()


def read_index(location: Location, storage: Storage | None = None) -> ShardIndex:
    """Reads the index of a shard folder.

    Args:
        location: folder, or URL that fsspec knows.
        storage: how to read it; None opens the location with the usual retries and no cache.

    Raises:
        InputError: no such folder, an unfinished one, or an index that cannot be used.
        StorageError: the storage does not answer.
    """
    # What is told of a folder depends on why it cannot be read: each has another way out.
    storage = storage or open_storage(location)
    where = storage.location
    path = storage.path(INDEX_FILE)
    try:
        text = storage.read_bytes(INDEX_FILE).decode("utf-8")
        contents = json.loads(text, object_pairs_hook=_entries_once)
    except FileNotFoundError as error:
        what = "has no index.json, so it is none or was never finished"
        if not storage.exists():
            what = "does not exist"
        raise InputError(
            f"shard folder {where}: {what}; write it with `megadlcm data prepare`"
        ) from error
    except NotADirectoryError as error:
        raise InputError(
            f"shard folder {where}: is a file; name a folder of `megadlcm data prepare`"
        ) from error
    except InputError:  # which says its own way out
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({_one_line(error)}); run `megadlcm data prepare --overwrite`"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"{path}: not an index of `megadlcm data prepare`; name a shard folder")
    # Before the digest: another version may compute it in another way.
    if contents.get("version") != VERSION:
        raise InputError(
            f"{path}: version {contents.get('version')}, this program reads {VERSION}; "
            "run `megadlcm data prepare --overwrite` with this program"
        )
    try:
        # Popped: the digest is that of all entries but itself.
        if contents.pop("index_sha256") != _header_digest(contents):
            raise ValueError("its own digest differs")
        rows = _read_rows(storage, contents)
        index = _decode(where, contents, rows)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {_one_line(error)}); "
            "run `megadlcm data prepare --overwrite`"
        ) from error
    if not index.shards:
        raise InputError(f"{path}: lists no shards; run `megadlcm data prepare` with documents")
    return index


def _read_rows(storage: Storage, contents: dict[str, Any]) -> np.ndarray:
    try:
        stored = storage.read_bytes(SHARDS_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{SHARDS_FILE} is missing") from error
    if hashlib.sha256(stored).hexdigest() != contents["shards_sha256"]:
        raise ValueError(f"{SHARDS_FILE} is not the one that was written with it")
    rows = load_array(io.BytesIO(stored))
    if rows.dtype != SHARD_DTYPE or rows.ndim != 1:
        raise ValueError(f"{SHARDS_FILE} has {rows.dtype}")
    return rows


def _decode(location: str, contents: dict[str, Any], rows: np.ndarray) -> ShardIndex:
    # The digest proves the bytes; a wrong writer could still sign counts that disagree.
    keys = ("tokenizer_sha256", "vocab_size", "eos_id", "max_token_id", "token_dtype")
    domains = contents["domains"].items()
    index = ShardIndex(
        location=location,
        shards=ShardList(rows),
        domains={name: DomainCounts(**_checked(counts)) for name, counts in domains},
        **_checked({key: contents[key] for key in keys}),
    )
    totals = [contents[key] for key in ("num_documents", "num_tokens", "num_bytes")]
    for what, found in (
        ("shards", [index.num_documents, index.num_tokens, index.num_bytes]),
        ("domains", [sum(column) for column in zip(*index.domains.values(), strict=True)]),
    ):
        if len(rows) and found != totals:
            raise ValueError(f"documents, tokens, bytes = {totals}, its {what} add up to {found}")
    # The end of text is among the ids that a reader meets, so it bounds the largest from below.
    if not index.eos_id <= index.max_token_id < index.vocab_size:
        raise ValueError(f"max_token_id = {index.max_token_id}")
    if (rows["num_documents"] < 1).any() or (rows["num_tokens"] < rows["num_documents"]).any():
        raise ValueError("a shard without documents, or a document without tokens")
    if (rows["last_record"] < 0).any() or (rows["last_record"] >= rows["tar_bytes"]).any():
        raise ValueError("a last_record outside its shard")
    if index.token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype = {index.token_dtype!r}")
    return index


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry whose texts are texts and whose other values are counts."""
    for key, value in entry.items():
        # type() and not isinstance: True is an int, and no count.
        if not (isinstance(value, str) if key in _TEXTS else type(value) is int and value >= 0):
            raise ValueError(f"{key} = {value!r}")
    return entry


def encode_index(index: ShardIndex) -> dict[str, bytes]:
    """Returns the files of an index by name, in the order in which they must be written."""
    stored = save_array(index.shards.rows)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "num_shards": len(index.shards),
        "num_documents": index.num_documents,
        "num_tokens": index.num_tokens,
        "num_bytes": index.num_bytes,
        "vocab_size": index.vocab_size,
        "eos_id": index.eos_id,
        "max_token_id": index.max_token_id,
        "token_dtype": index.token_dtype,
        "tokenizer_sha256": index.tokenizer_sha256,
        "shards_sha256": hashlib.sha256(stored).hexdigest(),
        "domains": {name: index.domains[name]._asdict() for name in sorted(index.domains)},
    }
    header["index_sha256"] = _header_digest(header)
    text = json.dumps(header, indent=2, ensure_ascii=False) + "\n"
    return {SHARDS_FILE: stored, INDEX_FILE: text.encode("utf-8")}


def _entries_once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object's entries; raises ValueError where one is there twice."""
    found = dict(entries)
    if len(found) != len(entries):
        raise ValueError("an entry is there twice")
    return found


def _header_digest(header: dict[str, Any]) -> str:
    """Returns the digest of index.json's entries but itself, however they are spaced."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
