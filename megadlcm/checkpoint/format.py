"""Bytes of the files of a checkpoint folder, and what the manifest says of them.

    manifest.json          written last: without a whole one the folder does not exist
    index.safetensors      where each slice of each tensor lies
    state.json             counters, resolved config, versions
    tokenizer.json         a copy, where the run has one
    rank_00000.safetensors ... one for each process that holds something: `master` (fp32), then an
                           array for each kind of optimizer state, each the slices one after another

Files have a checksum for every 4 MiB, so that any range of them is checked as it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import xxhash

from data_pipeline.errors import InputError

FORMAT = 2
"""Of the folder; 1 had no sharded files, and does not say so."""
BLOCK_BYTES = 1 << 22
INDEX = "index.safetensors"
TOKENIZER = "tokenizer.json"
MASTER = "master"
DIGEST = "xxh3_64"
_ALIGNMENT = 4096
_ITEM_BYTES = 4


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    size: int
    """Its bytes."""
    blocks: str
    """16 hex digits for each of its blocks."""
    digest: str
    """SHA-256 of the blocks' checksums, as hex."""

    @classmethod
    def of(cls, num_bytes: int, blocks: Iterable[int]) -> FileEntry:
        """From the size and the checksum of each block."""
        text = "".join(f"{block:016x}" for block in blocks)
        return cls(num_bytes, text, hashlib.sha256(bytes.fromhex(text)).hexdigest())

    @staticmethod
    def checksum(block: memoryview | bytes) -> int:
        """Of one block."""
        return xxhash.xxh3_64_intdigest(block)

    @property
    def num_blocks(self) -> int:
        """Blocks, of which the last may be short."""
        return -(-self.size // BLOCK_BYTES)

    def block(self, index: int) -> int:
        """Checksum of a block."""
        return int(self.blocks[16 * index : 16 * index + 16], 16)

    def check(self) -> None:
        """Raises ValueError where it contradicts itself."""
        if len(self.blocks) != 16 * self.num_blocks:
            raise ValueError("a file has another number of checksums than of blocks")
        if hashlib.sha256(bytes.fromhex(self.blocks)).hexdigest() != self.digest:
            raise ValueError("checksums of a file do not fit their digest")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is; it vouches for every file of its folder."""

    step: int
    """Completed optimizer steps."""
    run: str
    """Name of the run."""
    attempt: str
    """The start of the run that wrote it."""
    written: str
    """When, in UTC."""
    layout: dict[str, int]
    """Sizes of the axes that wrote it."""
    keys: list[str]
    """Kinds of optimizer state."""
    num_elements: int
    """Of all parameters and saved buffers."""
    rank_files: list[str]
    """Names by the file numbers of the index."""
    files: dict[str, FileEntry]
    """All files but the manifest."""
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    """Of each tensor: of its master, then by `keys`; 16 hex digits each."""
    previous_step: int | None = None
    """Of the checkpoint before it."""
    format: int = FORMAT
    """Version of all this."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size for entry in self.files.values())

    def encode(self) -> bytes:
        """Its text, the last line of which is the digest of what stands before."""
        text = json.dumps(asdict(self), indent=0, allow_nan=False)
        body = text.removesuffix("\n}") + ",\n"
        digest = hashlib.sha256(body.encode()).hexdigest()
        return f'{body}"digest": "{digest}"\n}}\n'.encode()

    @classmethod
    def decode(cls, content: bytes) -> Manifest:
        """Reads what `encode` wrote.

        Raises:
            InputError: it is torn, damaged or of a later version.
        """
        try:
            text = content.decode()
            values = json.loads(text)
            version = values.get("format")
            if isinstance(version, int) and version > FORMAT:
                raise InputError(
                    f"it has format {version}, and this version knows formats up to {FORMAT}: "
                    "install a later megadlcm"
                )
            body, _, _ = text.rpartition('"digest"')
            if values.pop("digest") != hashlib.sha256(body.encode()).hexdigest():
                raise ValueError("its digest does not fit it")
            values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
            manifest = cls(**values)
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"it is damaged ({error})") from error
        return manifest

    def _check(self) -> None:
        for entry in self.files.values():
            entry.check()
        if not self.files or missing(self.files, self.rank_files):
            raise ValueError("it does not list the files that it speaks of")


def missing(files: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Names of a list that are not among the files."""
    return [name for name in names if name not in files]


class Sink(Protocol):
    """A file being written."""

    def write(self, block: memoryview | bytes) -> None:
        """Appends bytes, all of them."""
        ...


def rank_file_name(rank: int) -> str:
    """Name of the file of a process."""
    return f"rank_{rank:05d}.safetensors"


def rank_file_header(sizes: Mapping[str, int]) -> bytes:
    """What stands before the arrays of a rank file.

    Args:
        sizes: fp32 elements by name, in the order of the arrays.
    """
    return fp32_header({name: (size,) for name, size in sizes.items()})


def fp32_header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What stands before fp32 arrays in a safetensors file, of a length that aligns them.

    Args:
        shapes: by name, in the order of the arrays.
    """
    entries, position = {}, 0
    for name, shape in shapes.items():
        end = position + _ITEM_BYTES * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    length = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def parse_header(content: bytes, num_bytes: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Places of the fp32 arrays of a safetensors file.

    Args:
        content: the beginning of the file, at least 8 bytes and the header.
        num_bytes: size of the file.

    Returns:
        By name the byte at which an array begins, and its shape.

    Raises:
        ValueError: it is no such file, or holds something else than fp32.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > num_bytes - 8 or length > len(content) - 8:
        raise ValueError("its header is damaged")
    places = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "F32" or not 0 <= begin <= end <= num_bytes - 8 - length:
            raise ValueError(f"{name} is no fp32 array in it")
        shape = tuple(int(extent) for extent in entry["shape"])
        if math.prod(shape) * _ITEM_BYTES != end - begin:
            raise ValueError(f"{name} has another size than its shape says")
        places[name] = (8 + length + begin, shape)
    return places


def write_blocks(sink: Sink, parts: Iterable[memoryview | bytes]) -> FileEntry:
    """Writes a file and takes the checksum of each block while it is in the cache.

    Args:
        sink: the file, which is empty.
        parts: its contents, in pieces of any lengths.

    Returns:
        What the manifest says of it.
    """
    checksums, total = [], 0
    for block in blocks_of(parts):
        checksums.append(FileEntry.checksum(block))
        sink.write(block)
        total += len(block)
    return FileEntry.of(total, checksums)


def blocks_of(parts: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """Cuts a stream into blocks; each is valid until the next one is asked for."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    filled = 0
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            if not filled and len(view) >= BLOCK_BYTES:  # without a copy
                yield view[:BLOCK_BYTES]
                view = view[BLOCK_BYTES:]
                continue
            count = min(BLOCK_BYTES - filled, len(view))
            buffer[filled : filled + count] = view[:count]
            filled, view = filled + count, view[count:]
            if filled == BLOCK_BYTES:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def block_problem(entry: FileEntry, index: int, content: memoryview | bytes) -> str:
    """What is wrong with a block of a file; empty if nothing is."""
    expected = min(BLOCK_BYTES, entry.size - index * BLOCK_BYTES)
    if len(content) != expected:
        return f"block {index} ends after {len(content):,} of {expected:,} bytes"
    if FileEntry.checksum(content) != entry.block(index):
        return f"block {index} (bytes {index * BLOCK_BYTES:,} on) has another checksum"
    return ""
