"""Tar files as prepare writes them: headers of members, padding, the end; and what reads them."""

from __future__ import annotations

import tarfile

BLOCK_BYTES = 512
"""Tar pads headers and members to this."""
RECORD_BYTES = 10240
"""Tar pads an archive to this."""
NAME_BYTES = 100
"""Of a header's first field, a zero behind the name included."""

# Eleven octal digits; GNU's and pax's ways to tell more are not read by everyone.
_LARGEST_MEMBER = 8**11
_SIZE_AT, _TIME_AT, _CHECKSUM_AT, _TYPE_AT = 124, 136, 148, 156
# TarInfo's own defaults are what reproducible bytes need: mtime, uid and gid 0, mode 0644.
_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
# What stands between and behind the three fields in which headers differ.
_OWNER = _TEMPLATE[NAME_BYTES:_SIZE_AT]
_TIME = _TEMPLATE[_TIME_AT:_CHECKSUM_AT]
_REST = _TEMPLATE[_TYPE_AT:]
# A header's checksum is the sum of its bytes, its own field counted as eight spaces.
_FIXED_SUM = sum(_OWNER) + sum(_TIME) + sum(_REST) + 8 * ord(" ")
_PADDING = [bytes(size) for size in range(BLOCK_BYTES)]


def member_header(name: bytes, size: int) -> bytes:
    """Returns what tarfile writes for a member, many times as fast.

    Raises:
        ValueError: a name or a size that a plain header cannot hold.
    """
    if len(name) >= NAME_BYTES or size >= _LARGEST_MEMBER:
        shown = name.decode("ascii", "replace")
        raise ValueError(f"{shown} of {size} bytes does not fit into a tar")
    sized = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(name) + sum(sized))
    return b"".join((name.ljust(NAME_BYTES, b"\0"), _OWNER, sized, _TIME, checksum, _REST))


def padding(size: int) -> bytes:
    """Returns the zeros that stand behind `size` bytes, up to the next block."""
    return _PADDING[-size % BLOCK_BYTES]


def archive_end(size: int) -> bytes:
    """Returns what closes a tar of `size` bytes: two empty blocks, padded."""
    end = 2 * BLOCK_BYTES
    return bytes(end + -(size + end) % RECORD_BYTES)


def is_header(block: bytes) -> bool:
    """Whether a block is a tar header, judged by its magic."""
    return len(block) == BLOCK_BYTES and block[257:262] == b"ustar"


def parse_header(block: bytes) -> tuple[str, int]:
    """Returns the name and the size that any tar header tells; ValueError where it is damaged."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(str(error)) from error
    return found.name, found.size
