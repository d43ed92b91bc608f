"""The bytes of a shard: one tar record per document, and the document table beside the tar.

A record is two tar members, as webdataset groups them by the name before the first dot:

    000000000042.json   {"id", "domain", "source", "num_bytes", "num_tokens"}
    000000000042.npy    the text's tokens, 1-D uint16 or uint32

The table NAME.documents.npy holds two arrays one after the other (numpy.load on an open file):
DOCUMENT_DTYPE rows, then the CRC-32 of every CHECKSUM_TOKENS tokens of each document. The table
makes a read O(1), the checksums make a read of a part of a long document safe.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 512
"""Tar pads headers and members to this."""

TAR_RECORD_BYTES = 10240
"""Tar pads an archive to this."""

CHECKSUM_TOKENS = 8192
"""Tokens covered by one checksum: 16 KiB of uint16, so a window reads little beyond itself."""

DOCUMENT_DTYPE = np.dtype(
    [
        ("record_offset", "<i8"),  # of the .json member's tar header
        ("tokens_offset", "<i8"),  # of the first token, behind the .npy header
        ("num_tokens", "<i8"),
        ("num_bytes", "<i8"),  # of the text in UTF-8
        ("metadata_bytes", "<i4"),  # of the .json member, which begins BLOCK_BYTES in
        ("domain", "<i4"),  # number in index.json's domains
    ]
)


class EncodedRecord(NamedTuple):
    """One document as it stands in the tar."""

    contents: bytes
    metadata_bytes: int
    tokens_at: int
    """Offset of the first token inside `contents`."""
    checksums: np.ndarray
    """uint32 (ceil(num_tokens / CHECKSUM_TOKENS),)."""


def encode_record(key: str, metadata: dict[str, object], tokens: np.ndarray) -> EncodedRecord:
    """Returns the tar bytes of a document; the same input gives the same bytes.

    Args:
        key: name of both members before the dot.
        metadata: what the .json member says.
        tokens: uint16 or uint32 (num_tokens,).
    """
    described = json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    stored = io.BytesIO()
    np.save(stored, tokens, allow_pickle=False)
    array = stored.getvalue()
    head = _member(f"{key}.json", described) + _tar_header(f"{key}.npy", len(array))
    return EncodedRecord(
        contents=head + array + bytes(-len(array) % BLOCK_BYTES),
        metadata_bytes=len(described),
        tokens_at=len(head) + len(array) - tokens.nbytes,
        checksums=chunk_checksums(tokens.tobytes(), tokens.itemsize),
    )


def chunk_checksums(contents: bytes | memoryview, itemsize: int) -> np.ndarray:
    """Returns the CRC-32 of every CHECKSUM_TOKENS tokens of `itemsize` bytes, uint32."""
    step = CHECKSUM_TOKENS * itemsize
    view = memoryview(contents)
    crcs = [zlib.crc32(view[at : at + step]) for at in range(0, len(view), step)]
    return np.array(crcs, dtype="<u4")


def archive_end(size: int) -> bytes:
    """Returns what closes a tar of `size` bytes: two empty blocks, padded."""
    end = 2 * BLOCK_BYTES
    return bytes(end + -(size + end) % TAR_RECORD_BYTES)


def is_tar_header(block: bytes) -> bool:
    """Whether a block is a tar header, judged by its magic."""
    return len(block) == BLOCK_BYTES and block[257:262] == b"ustar"


def encode_table(rows: np.ndarray, checksums: np.ndarray) -> bytes:
    """Returns the bytes of a document table from DOCUMENT_DTYPE rows and uint32 checksums."""
    stored = io.BytesIO()
    np.save(stored, rows, allow_pickle=False)
    np.save(stored, checksums, allow_pickle=False)
    return stored.getvalue()


class DocumentTable(NamedTuple):
    """The documents of one shard."""

    rows: np.ndarray
    """DOCUMENT_DTYPE (num_documents,)."""
    checksums: np.ndarray
    """uint32, those of all documents one after the other."""
    first_checksum: np.ndarray
    """int64 (num_documents,): where each document's checksums begin."""


def decode_table(contents: bytes) -> DocumentTable:
    """Reads a document table; raises ValueError when the bytes are none."""
    stored = io.BytesIO(contents)
    rows = np.load(stored, allow_pickle=False)
    checksums = np.load(stored, allow_pickle=False)
    if rows.dtype != DOCUMENT_DTYPE or rows.ndim != 1:
        raise ValueError(f"rows of {rows.dtype}")
    counts = -(-rows["num_tokens"] // CHECKSUM_TOKENS)
    ends = np.cumsum(counts)
    if len(rows) and (rows["num_tokens"].min() < 1 or len(checksums) != ends[-1]):
        raise ValueError("an empty document or a missing checksum")
    return DocumentTable(rows, checksums, ends - counts)


def _member(name: str, contents: bytes) -> bytes:
    padding = bytes(-len(contents) % BLOCK_BYTES)
    return _tar_header(name, len(contents)) + contents + padding


def _tar_header(name: str, size: int) -> bytes:
    # TarInfo's own defaults are what reproducible bytes need: mtime, uid and gid 0, mode 0644.
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
