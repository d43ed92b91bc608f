"""No byte of a shard goes unnoticed, and no damage stops the walk."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import read_index
from data_pipeline.config import SourceConfig
from data_pipeline.inspection.verify_shard import SHOWN_DOCUMENTS, ShardReport, verify_shard
from data_pipeline.inspection.walk import FolderFacts
from data_pipeline.shard_format.index import Shard
from data_pipeline.shard_format.records import encode_record
from data_pipeline.shard_format.table import (
    CHECKSUM_TOKENS,
    DOCUMENT_DTYPE,
    decode_table,
    encode_table,
)
from data_pipeline.shard_format.tar import BLOCK_BYTES, archive_end
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.local import LocalFile
from data_pipeline.storage.open import open_storage
from tests.support.tiny_shards import NUMBERED_VOCAB

MakeNumbered = Callable[..., SourceConfig]
FACTS = FolderFacts("uint16", NUMBERED_VOCAB - 1)


def look(folder: Path | str, shard: Shard, facts: FolderFacts = FACTS) -> ShardReport:
    """Verifies one shard; every byte of it is told as done, once."""
    done: list[int] = []
    report = verify_shard(open_storage(folder), facts, shard, done.append)
    assert sum(done) == shard.tar_bytes and min(done) > 0
    return report


def signed(folder: Path | str, shard: Shard) -> Shard:
    """The shard as an index would list the files that now lie there: digests do not help."""
    tar = (Path(folder) / shard.tar_name).read_bytes()
    table = (Path(folder) / shard.table_name).read_bytes()
    return shard._replace(
        tar_bytes=len(tar),
        tar_sha256=hashlib.sha256(tar).digest(),
        table_sha256=hashlib.sha256(table).digest(),
    )


def write_shard(
    folder: Path, keys: Sequence[str], stored: Callable[[np.ndarray], bytes] | None = None
) -> Shard:
    """Writes one-shard files of documents of 3, 4, ... tokens under these keys.

    Args:
        folder: to write to.
        keys: one per document.
        stored: other bytes of the same length for the .npy member of the last document.
    """
    contents, rows, checksums = b"", [], []
    for number, key in enumerate(keys):
        tokens = np.arange(1, 4 + number, dtype="<u2")
        metadata: dict[str, object] = {
            "id": key,
            "domain": "numbers",
            "source": "test",
            "num_bytes": len(tokens),
            "num_tokens": len(tokens),
        }
        record = encode_record(key, metadata, tokens)
        at, size = len(contents), len(tokens)
        offset = at + record.tokens_at
        rows.append((at, offset, size, size, record.metadata_bytes, 0))
        checksums.append(record.checksums)
        contents += record.contents
        if stored and number == len(keys) - 1:
            array = stored(tokens)
            begin = offset + tokens.nbytes - len(array)
            contents = contents[:begin] + array + contents[offset + tokens.nbytes :]
    contents += archive_end(len(contents))
    table_rows = np.array(rows, dtype=DOCUMENT_DTYPE)
    num_tokens, last = int(table_rows["num_tokens"].sum()), int(table_rows["record_offset"][-1])
    shard = Shard(0, len(rows), num_tokens, num_tokens, len(contents), last, b"", b"")
    (folder / shard.tar_name).write_bytes(contents)
    table = encode_table(table_rows, np.concatenate(checksums), ["numbers"])
    (folder / shard.table_name).write_bytes(table)
    return signed(folder, shard)


def test_a_changed_byte_is_found_without_a_digest(make_numbered: MakeNumbered) -> None:
    """Wherever it lies: so whatever passes is what prepare writes, and webdataset reads it."""
    source = make_numbered([5, 40, 3], shard_tokens=1000)
    folder = Path(source.path)
    shard = read_index(folder).shards[0]
    assert look(folder, signed(folder, shard)).problems == ()
    path = folder / shard.tar_name
    sound = path.read_bytes()
    used = sum(1 for byte in sound if byte)
    positions = {*range(0, len(sound), 17), *(at for at, byte in enumerate(sound) if byte)}
    assert len(positions) > used > 500
    for position in sorted(positions):
        changed = bytearray(sound)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert look(folder, signed(folder, shard)).problems, position


def test_a_changed_table_never_stops_the_walk(make_numbered: MakeNumbered) -> None:
    """Even one that the index vouches for, whatever offsets and sizes it names."""
    source = make_numbered([5, CHECKSUM_TOKENS + 7, 3], shard_tokens=5000)
    folder = Path(source.path)
    shard = read_index(folder).shards[0]
    path = folder / shard.table_name
    sound = path.read_bytes()
    rows_at = sound.index(b"\n") + 1
    rows_end = rows_at + 3 * DOCUMENT_DTYPE.itemsize
    generator = random.Random(0)
    for number in range(1500):
        changed = bytearray(sound)
        inside = number % 2  # of the rows, where every bit has a meaning
        at = generator.randrange(rows_at, rows_end) if inside else generator.randrange(len(sound))
        changed[at] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        problems = look(folder, signed(folder, shard)).problems
        assert problems or not inside
        assert all("\n" not in problem for problem in problems)


def test_two_records_of_one_name_are_found(tmp_path: Path) -> None:
    """Webdataset would make one sample of them."""
    assert look(tmp_path, write_shard(tmp_path, ["a", "b", "a"])).problems == ()
    (problem,) = look(tmp_path, write_shard(tmp_path, ["a", "b", "b"])).problems
    assert "document 2: key b'b' cannot be told" in problem
    (problem,) = look(tmp_path, write_shard(tmp_path, ["a", "b.c"])).problems
    assert "document 1: key b'b.c'" in problem


def test_the_array_header_of_another_numpy_will_do(tmp_path: Path) -> None:
    """As long as it says the same; older ones pad it otherwise."""

    def other(tokens: np.ndarray, order: str = "False", descr: str = "<u2") -> bytes:
        text = f"{{'shape': ({len(tokens)},), 'fortran_order': {order}, 'descr': '{descr}'}}"
        usual = io.BytesIO()
        np.save(usual, tokens)
        header_bytes = len(usual.getvalue()) - tokens.nbytes
        magic = b"\x93NUMPY\x01\x00" + (header_bytes - 10).to_bytes(2, "little")
        return magic + text.ljust(header_bytes - 11).encode() + b"\n" + tokens.tobytes()

    assert look(tmp_path, write_shard(tmp_path, ["a", "b"], other)).problems == ()
    wrong = write_shard(tmp_path, ["a", "b"], lambda tokens: other(tokens, descr="<i2"))
    (problem,) = look(tmp_path, wrong).problems
    assert "document 1: tokens int16 (4,), must be uint16" in problem


def test_many_damaged_documents_are_counted(make_numbered: MakeNumbered) -> None:
    """The first ones are told; a million lines would help nobody."""
    source = make_numbered([2] * 100, shard_tokens=1000)
    folder = Path(source.path)
    shard = read_index(folder).shards[0]
    path = folder / shard.tar_name
    contents = bytearray(path.read_bytes())
    for row in decode_table((folder / shard.table_name).read_bytes()).rows[:70]:
        contents[int(row["tokens_offset"])] ^= 1
    path.write_bytes(contents)
    digest, *documents, rest = look(folder, shard).problems
    assert "sha256" in digest and "50 more problems" in rest
    assert len(documents) == SHOWN_DOCUMENTS == 20
    for number, problem in enumerate(documents):
        assert f"document {number}: its tokens are not those written (checksum)" in problem


def test_each_byte_is_read_once(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hashed as it passes, however little is read at once."""
    source = make_numbered([30, 3000, 1, 4], shard_tokens=10_000)
    shard = read_index(source.path).shards[0]
    first_look = 2 * BLOCK_BYTES  # presence, size, two headers
    for read_bytes in (1 << 22, 1):
        reads: list[int] = []
        pread = LocalFile.pread

        def counted(
            self: LocalFile,
            size: int,
            offset: int,
            reads: list[int] = reads,
            pread: Callable[[LocalFile, int, int], bytes] = pread,
        ) -> bytes:
            contents = pread(self, size, offset)
            reads.append(len(contents))
            return contents

        with monkeypatch.context() as patch:
            patch.setattr("data_pipeline.inspection.verify_shard.READ_BYTES", read_bytes)
            patch.setattr(LocalFile, "pread", counted)
            assert look(source.path, shard).problems == ()
        assert sum(reads) == shard.tar_bytes + first_look
        assert (len(reads) > 6) == (read_bytes == 1)


def test_storage_that_fails_is_not_called_damage(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another look may find everything sound."""
    source = make_numbered([5, 40, 3], shard_tokens=1000)
    shard = read_index(source.path).shards[0]

    def broken(descriptor: int, size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_pipeline.storage.local.os.pread", broken)
    storage = open_storage(source.path, StorageOptions(attempts=2, wait_seconds=0.0))
    report = verify_shard(storage, FACTS, shard, lambda num_bytes: None)
    assert report.unread and report.domains is None
    assert "cannot be read after 2 attempts" in report.problems[0]


def test_a_tar_that_ends_early_and_one_that_goes_on_are_found(
    make_numbered: MakeNumbered,
) -> None:
    """By its table, where even the index names the wrong size."""
    source = make_numbered([5, 40, 3], shard_tokens=1000)
    folder = Path(source.path)
    shard = read_index(folder).shards[0]
    path = folder / shard.tar_name
    sound = path.read_bytes()
    for contents in (sound[:-BLOCK_BYTES], sound + bytes(BLOCK_BYTES)):
        path.write_bytes(contents)
        (problem,) = look(folder, signed(folder, shard)).problems
        assert "too far from the end of the tar" in problem
        done: list[int] = []
        report = verify_shard(open_storage(folder), FACTS, shard, done.append)
        assert f"{len(contents)} bytes, {len(sound)} were written" in report.problems[0]
        assert sum(done) == shard.tar_bytes
