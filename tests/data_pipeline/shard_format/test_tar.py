"""Headers of members: what the standard library writes, and what it reads."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shard_format.tar import (
    BLOCK_BYTES,
    NAME_BYTES,
    RECORD_BYTES,
    archive_end,
    is_header,
    member_header,
    padding,
    parse_header,
)

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=99)
SIZES = st.integers(0, 8**11 - 1)


@given(NAMES, SIZES)
def test_a_header_is_the_one_that_tarfile_writes(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    written = member_header(name.encode(), size)
    assert written == member.tobuf(tarfile.USTAR_FORMAT)
    assert is_header(written) and parse_header(written) == (member.name, size)


@given(st.integers(0, BLOCK_BYTES - 1), st.integers(1, 255))
def test_a_header_with_a_wrong_byte_is_not_taken_for_another(at: int, change: int) -> None:
    block = bytearray(member_header(b"000000-000000000042.json", 123))
    block[at] ^= change
    try:
        found = parse_header(bytes(block))
    except ValueError:
        return
    # no sum of bytes sees how the digits of the checksum itself are padded
    assert 148 <= at < 156 and found == ("000000-000000000042.json", 123)


@pytest.mark.parametrize(("name", "size"), [(b"x" * NAME_BYTES, 1), (b"x", 8**11)])
def test_what_a_plain_header_cannot_hold_is_refused(name: bytes, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit into a tar"):
        member_header(name, size)


@pytest.mark.parametrize("block", [b"", bytes(BLOCK_BYTES), member_header(b"a", 1)[:-1]])
def test_what_is_no_header_is_told_from_one(block: bytes) -> None:
    assert not is_header(block)
    with pytest.raises(ValueError, match=r"\w"):
        parse_header(block)


@given(st.lists(st.binary(max_size=2000), max_size=6))
def test_an_archive_is_the_one_that_tarfile_closes(members: list[bytes]) -> None:
    theirs = io.BytesIO()
    ours = b""
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, contents in enumerate(members):
            member = tarfile.TarInfo(str(number))
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
            ours += member_header(str(number).encode(), len(contents)) + contents
            ours += padding(len(contents))
    ours += archive_end(len(ours))
    assert ours == theirs.getvalue() and len(ours) % RECORD_BYTES == 0
