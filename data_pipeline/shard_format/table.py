"""The document table beside a tar, which makes any part of any document readable at once.

NAME.documents.npy holds three arrays one after the other (numpy.load on an open file):
DOCUMENT_DTYPE rows; for each document the CRC-32 of its .json member and of every CHECKSUM_TOKENS
tokens; the names of the shard's domains as a JSON list in uint8. The rows make a read O(1), the
checksums make a read of a part of a long document safe.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from data_pipeline.shard_format.array import load_array, save_array

CHECKSUM_TOKENS = 1024
"""Tokens covered by one checksum: 2 KiB of uint16, so a window reads little beyond itself."""

DOCUMENT_DTYPE = np.dtype(
    [
        ("record_offset", "<i8"),  # of the .json member's tar header
        ("tokens_offset", "<i8"),  # of the first token, behind the .npy header
        ("num_tokens", "<i8"),
        ("num_bytes", "<i8"),  # of the text in UTF-8
        ("metadata_bytes", "<i4"),  # of the .json member, which begins a tar block in
        ("domain", "<i4"),  # number in the table's list of domains
    ]
)


class DocumentTable(NamedTuple):
    """The documents of one shard."""

    rows: np.ndarray
    """DOCUMENT_DTYPE (num_documents,)."""
    checksums: np.ndarray
    """uint32, those of all documents one after the other."""
    first_checksum: np.ndarray
    """int64 (num_documents,): where those of each document's tokens begin, behind that of its
    metadata."""
    domains: tuple[str, ...]
    """Names by number."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays in memory."""
        return self.rows.nbytes + self.checksums.nbytes + self.first_checksum.nbytes


def most_table_bytes(num_documents: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """Returns what tables of so many documents and tokens may have in memory, int64."""
    # metadata has a checksum, and so has the last chunk of each document, however short
    checksums = 2 * num_documents + num_tokens // CHECKSUM_TOKENS
    return num_documents * (DOCUMENT_DTYPE.itemsize + 8) + 4 * checksums


def chunk_checksums(contents: bytes | memoryview, itemsize: int) -> np.ndarray:
    """Returns the CRC-32 of every CHECKSUM_TOKENS tokens of `itemsize` bytes, uint32."""
    step = CHECKSUM_TOKENS * itemsize
    view = memoryview(contents)
    crcs = [crc32(view[at : at + step]) for at in range(0, len(view), step)]
    return np.array(crcs, dtype="<u4")


def encode_table(rows: np.ndarray, checksums: np.ndarray, domains: Sequence[str]) -> bytes:
    """Returns the bytes of a document table.

    Args:
        rows: DOCUMENT_DTYPE (num_documents,).
        checksums: uint32, those of all documents one after the other.
        domains: names by number.
    """
    names = json.dumps(list(domains), ensure_ascii=False).encode("utf-8")
    return b"".join(map(save_array, (rows, checksums, np.frombuffer(names, dtype=np.uint8))))


def decode_table(contents: bytes) -> DocumentTable:
    """Reads a document table; raises ValueError when the bytes are none."""
    stored = io.BytesIO(contents)
    rows, checksums, names = (load_array(stored) for _ in range(3))
    domains = json.loads(names.tobytes())
    if rows.dtype != DOCUMENT_DTYPE or rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows of {rows.dtype} {rows.shape}")
    # A document has the checksum of its metadata and at least one of its tokens.
    counts = 1 + -(-rows["num_tokens"] // CHECKSUM_TOKENS)
    ends = np.cumsum(counts)
    if rows["num_tokens"].min() < 1 or checksums.dtype != "<u4" or len(checksums) != ends[-1]:
        raise ValueError("an empty document or a missing checksum")
    named = isinstance(domains, list) and all(isinstance(name, str) for name in domains)
    if not named or rows["domain"].min() < 0 or rows["domain"].max() >= len(domains):
        raise ValueError("a document without a domain")
    return DocumentTable(rows, checksums, ends - counts + 1, tuple(domains))
