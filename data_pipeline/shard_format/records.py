"""A document as it stands in the tar of a shard.

A record is two tar members, as webdataset groups them by the name before the first dot:

    000000000042.json   {"id", "domain", "source", "num_bytes", "num_tokens"}
    000000000042.npy    the text's tokens, 1-D uint16 or uint32
"""

from __future__ import annotations

import json
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data_pipeline.shard_format.array import array_header
from data_pipeline.shard_format.table import chunk_checksums
from data_pipeline.shard_format.tar import BLOCK_BYTES, member_header, padding

# No space and no escapes: a record is the same bytes everywhere, and as short as can be.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class EncodedRecord(NamedTuple):
    """One document as it stands in the tar."""

    contents: bytes
    metadata_bytes: int
    tokens_at: int
    """Offset of the first token inside `contents`."""
    checksums: np.ndarray
    """uint32 (1 + ceil(num_tokens / CHECKSUM_TOKENS),): of the metadata, then of the tokens."""


def encode_record(key: str, metadata: dict[str, object], tokens: np.ndarray) -> EncodedRecord:
    """Returns the tar bytes of a document; the same input gives the same bytes.

    Args:
        key: name of both members before the dot.
        metadata: what the .json member says.
        tokens: uint16 or uint32 (num_tokens,).
    """
    described = _JSON.encode(metadata).encode("utf-8")
    stored, described_array = tokens.tobytes(), array_header(tokens.dtype.str, len(tokens))
    array_bytes = len(described_array) + len(stored)
    name = key.encode("ascii")
    head = (
        member_header(name + b".json", len(described)),
        described,
        padding(len(described)),
        member_header(name + b".npy", array_bytes),
        described_array,
    )
    # Its own checksum: metadata is read without the tokens, and tokens without it.
    described_crc = np.array([crc32(described)], dtype="<u4")
    return EncodedRecord(
        contents=b"".join((*head, stored, padding(array_bytes))),
        metadata_bytes=len(described),
        tokens_at=sum(map(len, head)),
        checksums=np.concatenate((described_crc, chunk_checksums(stored, tokens.itemsize))),
    )


def array_offsets(rows: np.ndarray) -> np.ndarray:
    """Returns where the .npy member of each record begins behind its tar header.

    Args:
        rows: DOCUMENT_DTYPE (num_documents,).

    Returns:
        int64 (num_documents,), in bytes of the tar.
    """
    metadata_blocks = -(-rows["metadata_bytes"].astype(np.int64) // BLOCK_BYTES)
    offsets: np.ndarray = rows["record_offset"] + (2 + metadata_blocks) * BLOCK_BYTES
    return offsets
