"""The bytes of a shard: one tar record per document, and the document table beside the tar.

A record is two tar members, as webdataset groups them by the name before the first dot:

    000000000042.json   {"id", "domain", "source", "num_bytes", "num_tokens"}
    000000000042.npy    the text's tokens, 1-D uint16 or uint32

The table NAME.documents.npy holds three arrays one after the other (numpy.load on an open file):
DOCUMENT_DTYPE rows; for each document the CRC-32 of its .json member and of every CHECKSUM_TOKENS
tokens; the names of the shard's domains as a JSON list in uint8. The table makes a read O(1), the
checksums make a read of a part of a long document safe.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK_BYTES = 512
"""Tar pads headers and members to this."""

TAR_RECORD_BYTES = 10240
"""Tar pads an archive to this."""

CHECKSUM_TOKENS = 1024
"""Tokens covered by one checksum: 2 KiB of uint16, so a window reads little beyond itself."""

DOCUMENT_DTYPE = np.dtype(
    [
        ("record_offset", "<i8"),  # of the .json member's tar header
        ("tokens_offset", "<i8"),  # of the first token, behind the .npy header
        ("num_tokens", "<i8"),
        ("num_bytes", "<i8"),  # of the text in UTF-8
        ("metadata_bytes", "<i4"),  # of the .json member, which begins BLOCK_BYTES in
        ("domain", "<i4"),  # number in the table's list of domains
    ]
)

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_NAME_BYTES = 100
_LARGEST_MEMBER = 8**11
_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
_TEMPLATE_SUM = sum(_TEMPLATE[:124]) + sum(_TEMPLATE[135:148]) + 8 * 0x20 + sum(_TEMPLATE[156:])

# numpy parses headers with Python's own parser, whose depth of recursion is one number for all
# threads: two at once, with the garbage collector in between, fail with "recursion depth mismatch".
_parsing = threading.Lock()


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
    stored, array_header = tokens.tobytes(), _array_header(tokens.dtype.str, len(tokens))
    array_bytes = len(array_header) + len(stored)
    head = (
        _tar_header(f"{key}.json", len(described)),
        described,
        bytes(-len(described) % BLOCK_BYTES),
        _tar_header(f"{key}.npy", array_bytes),
        array_header,
    )
    described_crc = np.array([zlib.crc32(described)], dtype="<u4")
    return EncodedRecord(
        contents=b"".join((*head, stored, bytes(-array_bytes % BLOCK_BYTES))),
        metadata_bytes=len(described),
        tokens_at=sum(map(len, head)),
        checksums=np.concatenate((described_crc, chunk_checksums(stored, tokens.itemsize))),
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


def encode_table(rows: np.ndarray, checksums: np.ndarray, domains: Sequence[str]) -> bytes:
    """Returns the bytes of a document table.

    Args:
        rows: DOCUMENT_DTYPE (num_documents,).
        checksums: uint32, those of all documents one after the other.
        domains: names by number.
    """
    stored = io.BytesIO()
    names = json.dumps(list(domains), ensure_ascii=False).encode("utf-8")
    for array in (rows, checksums, np.frombuffer(names, dtype=np.uint8)):
        np.save(stored, array, allow_pickle=False)
    return stored.getvalue()


def decode_table(contents: bytes) -> DocumentTable:
    """Reads a document table; raises ValueError when the bytes are none."""
    stored = io.BytesIO(contents)
    rows, checksums, names = (load_array(stored) for _ in range(3))
    domains = json.loads(names.tobytes())
    if rows.dtype != DOCUMENT_DTYPE or rows.ndim != 1 or not len(rows):
        raise ValueError(f"rows of {rows.dtype} {rows.shape}")
    counts = 1 + -(-rows["num_tokens"] // CHECKSUM_TOKENS)
    ends = np.cumsum(counts)
    if rows["num_tokens"].min() < 1 or checksums.dtype != "<u4" or len(checksums) != ends[-1]:
        raise ValueError("an empty document or a missing checksum")
    named = isinstance(domains, list) and all(isinstance(name, str) for name in domains)
    if not named or rows["domain"].min() < 0 or rows["domain"].max() >= len(domains):
        raise ValueError("a document without a domain")
    return DocumentTable(rows, checksums, ends - counts + 1, tuple(domains))


def load_array(file: BinaryIO) -> np.ndarray:
    """Reads an array of the .npy format; raises ValueError where the bytes are none."""
    try:
        with _parsing:
            array: np.ndarray = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy's parser of headers lets through what Python's raises
        raise ValueError(f"no array ({' '.join(str(error).split())})") from error
    return array


@lru_cache(maxsize=1 << 14)
def _array_header(dtype: str, num_tokens: int) -> bytes:
    """Returns what numpy.save writes before the tokens; most lengths of a corpus come often."""
    stored = io.BytesIO()
    tokens = np.zeros(num_tokens, dtype=dtype)
    np.save(stored, tokens, allow_pickle=False)
    return stored.getvalue()[: stored.tell() - tokens.nbytes]


def _tar_header(name: str, size: int) -> bytes:
    """Returns what tarfile writes for a member, many times as fast.

    TarInfo's own defaults are what reproducible bytes need: mtime, uid and gid 0, mode 0644.
    """
    if len(name) >= _NAME_BYTES or size >= _LARGEST_MEMBER:
        raise ValueError(f"{name} of {size} bytes does not fit into a tar")
    named, sized = name.encode("ascii"), b"%011o" % size
    # A checksum counts its own field, spaces while it is not known, and the rest of the template.
    checksum = b"%06o" % (_TEMPLATE_SUM + sum(named) + sum(sized))
    before_size, before_checksum = _TEMPLATE[_NAME_BYTES:124], _TEMPLATE[135:148]
    padded = named.ljust(_NAME_BYTES, b"\0")
    return b"".join((padded, before_size, sized, before_checksum, checksum, _TEMPLATE[154:]))
