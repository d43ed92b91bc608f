"""index.json of a shard folder: written last, one line per shard, read without opening a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.output_folder import write_durably

INDEX_FILE = "index.json"
FORMAT = "webdataset-token-shards"
VERSION = 1
TOKEN_DTYPES = ("uint16", "uint32")
_TEXTS = ("name", "tar_sha256", "table_sha256", "tokenizer_sha256", "token_dtype")


class Shard(NamedTuple):
    """One tar file and the document table beside it."""

    name: str
    """File name without ending: NAME.tar and NAME.documents.npy."""
    num_documents: int
    num_tokens: int
    """Text tokens; no end-of-text tokens are stored."""
    num_bytes: int
    """UTF-8 bytes of the texts."""
    tar_bytes: int
    """Size of the tar file."""
    last_record: int
    """Offset of the last record's first tar header."""
    tar_sha256: str
    table_sha256: str

    @property
    def num_stream_tokens(self) -> int:
        """Places in the stream: a document of n tokens takes n + 1."""
        return self.num_tokens + self.num_documents


class DomainCounts(NamedTuple):
    """What one domain holds."""

    documents: int
    tokens: int
    bytes: int

    def with_document(self, num_tokens: int, num_bytes: int) -> DomainCounts:
        """Returns the counts with one document more."""
        return DomainCounts(self.documents + 1, self.tokens + num_tokens, self.bytes + num_bytes)


@dataclass(frozen=True)
class ShardIndex:
    """What is in a finished shard folder."""

    folder: Path
    shards: tuple[Shard, ...]
    domains: Mapping[str, DomainCounts]
    """By name, in the order of the numbers in the document tables."""
    tokenizer_sha256: str
    """Digest of the tokenizer.json in the folder."""
    vocab_size: int
    """Of the tokenizer: one more than its largest id."""
    eos_id: int
    max_token_id: int
    """Largest id a reader meets, eos included."""
    token_dtype: str
    """numpy name of the stored tokens."""

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Text tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of one epoch as trained: every text token and one end-of-text per document."""
        return self.num_tokens + self.num_documents

    @property
    def shard_stream_tokens(self) -> np.ndarray:
        """int64 (num_shards,): stream tokens of each shard."""
        return np.array([shard.num_stream_tokens for shard in self.shards], dtype=np.int64)

    def tar_path(self, shard: Shard) -> Path:
        """Path of a shard's tar file."""
        return self.folder / f"{shard.name}.tar"

    def table_path(self, shard: Shard) -> Path:
        """Path of a shard's document table."""
        return self.folder / f"{shard.name}.documents.npy"


def read_index(folder: str | Path) -> ShardIndex:
    """Reads index.json of a shard folder.

    Raises:
        InputError: no such folder, an unfinished one, or an index that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"shard folder {folder}: {what}; write it with `megadlcm data prepare`")
    path = folder / INDEX_FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"shard folder {folder}: has no {INDEX_FILE}, so it is none or was never finished; "
            "run `megadlcm data prepare` again"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({_one_line(error)}); run `megadlcm data prepare --overwrite`"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"{path}: not an index of `megadlcm data prepare`; name a shard folder")
    if contents.get("version") != VERSION:
        raise InputError(
            f"{path}: version {contents.get('version')}, this program reads {VERSION}; "
            "run `megadlcm data prepare --overwrite` with this program"
        )
    try:
        index = _decode(folder, contents)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged ({type(error).__name__}: {_one_line(error)}); "
            "run `megadlcm data prepare --overwrite`"
        ) from error
    if not index.shards:
        raise InputError(f"{path}: lists no shards; run `megadlcm data prepare` with documents")
    return index


def _decode(folder: Path, contents: dict[str, Any]) -> ShardIndex:
    keys = ("tokenizer_sha256", "vocab_size", "eos_id", "max_token_id", "token_dtype")
    domains = contents["domains"].items()
    index = ShardIndex(
        folder=folder,
        shards=tuple(Shard(**_checked(shard)) for shard in contents["shards"]),
        domains={name: DomainCounts(**_checked(counts)) for name, counts in domains},
        **_checked({key: contents[key] for key in keys}),
    )
    totals = [contents[key] for key in ("num_documents", "num_tokens", "num_bytes")]
    for what, found in (
        ("shards", [index.num_documents, index.num_tokens, index.num_bytes]),
        ("domains", [sum(column) for column in zip(*index.domains.values(), strict=True)]),
    ):
        if index.shards and found != totals:
            raise ValueError(f"documents, tokens, bytes = {totals}, its {what} add up to {found}")
    if not index.eos_id <= index.max_token_id < index.vocab_size:
        raise ValueError(f"max_token_id = {index.max_token_id}")
    if any(shard.last_record >= shard.tar_bytes for shard in index.shards):
        raise ValueError("a last_record behind the end of its shard")
    if index.token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype = {index.token_dtype!r}")
    return index


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry whose texts are texts and whose other values are counts."""
    for key, value in entry.items():
        if not (isinstance(value, str) if key in _TEXTS else type(value) is int and value >= 0):
            raise ValueError(f"{key} = {value!r}")
    return entry


def write_index(index: ShardIndex) -> None:
    """Writes index.json so that it is whole or absent, whenever the writer is killed."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "num_documents": index.num_documents,
        "num_tokens": index.num_tokens,
        "num_bytes": index.num_bytes,
        "vocab_size": index.vocab_size,
        "eos_id": index.eos_id,
        "max_token_id": index.max_token_id,
        "token_dtype": index.token_dtype,
        "tokenizer_sha256": index.tokenizer_sha256,
        "domains": {name: counts._asdict() for name, counts in index.domains.items()},
    }
    head = json.dumps(header, indent=2, ensure_ascii=False)
    lines = ",\n".join(json.dumps(shard._asdict()) for shard in index.shards)
    text = f'{head[:-2]},\n  "shards": [\n{lines}\n  ]\n}}\n'
    write_durably(index.folder / INDEX_FILE, text.encode("utf-8"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
