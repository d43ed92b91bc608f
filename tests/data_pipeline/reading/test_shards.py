"""Damage to a shard folder is found where it can be, and always named."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import open_samples, read_index
from data_pipeline.config import SourceConfig
from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.reading.least_recent import KEPT_SHARDS
from data_pipeline.reading.open_files import OpenFiles, most_files
from data_pipeline.reading.shards import ShardReader, open_documents
from data_pipeline.shard_format.index import Shard, ShardIndex
from data_pipeline.shard_format.table import CHECKSUM_TOKENS, decode_table
from data_pipeline.storage.local import LocalFolder
from data_pipeline.storage.open import open_storage
from tests.support.damage import change_index, flip
from tests.support.samples import check_sources
from tests.support.tiny_shards import NUMBERED_VOCAB, config_of, numbered_documents, one_line

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [30, 5, 1, 20, 9, 44]


@pytest.fixture
def source(make_numbered: MakeNumbered) -> Iterator[SourceConfig]:
    """A sound folder of several shards, proved sound before the test damages it."""
    source = make_numbered(LENGTHS)
    assert not list(verify_folder(read_index(source.path)))
    check_sources(config_of(source), NUMBERED_VOCAB)
    assert len(read_index(source.path).shards) >= 3
    yield source


def tar_path(index: ShardIndex, shard: Shard) -> Path:
    """Path of a shard's tar file."""
    return Path(index.location) / shard.tar_name


def table_path(index: ShardIndex, shard: Shard) -> Path:
    """Path of a shard's document table."""
    return Path(index.location) / shard.table_name


def reader_of(source: SourceConfig) -> ShardReader:
    """A reader of a folder."""
    storage = open_storage(source.path)
    return ShardReader(read_index(source.path, storage), storage)


def read_all(source: SourceConfig) -> None:
    """Reads a whole epoch and every document."""
    list(open_documents(source.path))
    list(islice(open_samples(config_of(source)), 8))


def damage(source: SourceConfig, kind: str) -> Path:
    """Damages the second shard in one of the ways below and returns the file."""
    index = read_index(source.path)
    shard = index.shards[1]
    tar, table = tar_path(index, shard), table_path(index, shard)
    rows = decode_table(table.read_bytes()).rows
    if kind == "missing shard":
        tar.unlink()
    elif kind == "missing table":
        table.unlink()
        return table
    elif kind == "truncated tar":
        tar.write_bytes(tar.read_bytes()[: int(rows["tokens_offset"][-1]) + 2])
    elif kind == "overwritten head":
        tar.write_bytes(b"\0" * 4096 + tar.read_bytes()[4096:])
    elif kind == "flipped token":
        flip(tar, int(rows["tokens_offset"][0]) + 1)
    elif kind == "flipped metadata":
        flip(tar, int(rows["record_offset"][0]) + 512)
    elif kind == "flipped table":
        flip(table, 200)
        return table
    return tar


@pytest.mark.parametrize(
    "kind", ["missing shard", "missing table", "truncated tar", "overwritten head"]
)
def test_damage_that_shows_from_outside_is_found_before_the_first_step(
    kind: str, source: SourceConfig
) -> None:
    """Without reading the shards."""
    path = damage(source, kind)
    with pytest.raises(InputError, match=path.name) as error:
        check_sources(config_of(source), NUMBERED_VOCAB)
    assert "megadlcm data verify" in one_line(error)


@pytest.mark.parametrize(
    "kind",
    [
        "missing shard",
        "missing table",
        "truncated tar",
        "overwritten head",
        "flipped token",
        "flipped metadata",
        "flipped table",
    ],
)
def test_any_damage_is_found_by_reading_and_by_verify(kind: str, source: SourceConfig) -> None:
    """The message names the file, and the document where it is one document's."""
    path = damage(source, kind)
    with pytest.raises(InputError, match=path.name) as error:
        read_all(source)
    message = one_line(error)
    assert ("document 0" in message) == (
        kind in ("flipped token", "flipped metadata", "overwritten head")
    )
    problems = list(verify_folder(read_index(source.path)))
    assert any(path.name in problem for problem in problems)


@pytest.mark.parametrize("key", ["documents", "tokens", "bytes"])
def test_counts_credited_to_another_domain_are_found_by_verify(
    key: str, make_shards: Callable[..., Path]
) -> None:
    """The sums agree, so that nothing else finds it; bits per byte of a domain would be wrong."""
    folder = make_shards()
    assert not list(verify_folder(read_index(folder)))

    def credit_another(contents: dict[str, Any]) -> None:
        contents["domains"]["a"][key] -= 1
        contents["domains"]["b"][key] += 1

    change_index(folder, credit_another)
    problems = list(verify_folder(read_index(folder)))
    assert [problem.split(": ")[1] for problem in problems] == ["domain a", "domain b"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"vocab_size": 301}, "vocab_size = 300, the index says 301"),
        ({"eos_id": 5}, "eos_id = 0, the index says 5"),
    ],
)
def test_an_index_that_contradicts_its_tokenizer_is_found_by_verify(
    change: dict[str, int], problem: str, make_shards: Callable[..., Path]
) -> None:
    """Documents would be opened with a token that is not the end of a text."""
    folder = make_shards()
    change_index(folder, lambda contents: contents.update(change))
    (found,) = verify_folder(read_index(folder))
    assert found.startswith(f"{folder / 'tokenizer.json'}: {problem}")
    with pytest.raises(InputError, match=problem):
        check_sources(config_of(SourceConfig(str(folder))), NUMBERED_VOCAB)


def test_a_kept_tokenizer_that_is_none_is_found_by_verify(make_shards: Callable[..., Path]) -> None:
    """Although its digest is the one of the index."""
    folder = make_shards()
    (folder / "tokenizer.json").write_bytes(b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    change_index(folder, lambda contents: contents.update(tokenizer_sha256=digest))
    problems = list(verify_folder(read_index(folder)))
    assert len(problems) == 1 and "not a tokenizer.json" in problems[0]


def test_verify_reports_every_problem(source: SourceConfig) -> None:
    """Not only the first one."""
    index = read_index(source.path)
    damage(source, "flipped token")
    folder = Path(index.location)
    tar_path(index, index.shards[0]).unlink()
    (folder / "tokenizer.json").write_bytes(b"another")
    (folder / "shard-000077.tar").write_bytes(b"")
    problems = "\n".join(verify_folder(index))
    for part in ("tokenizer.json", "shard-000000.tar: missing", "checksum", "shard-000077.tar"):
        assert part in problems


def test_a_foreign_tokenizer_file_is_found_before_the_first_step(source: SourceConfig) -> None:
    """Texts would be decoded to something else."""
    kept = Path(source.path) / "tokenizer.json"
    kept.write_bytes(b"another")
    with pytest.raises(InputError, match="not the tokenizer"):
        check_sources(config_of(source), NUMBERED_VOCAB)
    kept.unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: missing"):
        check_sources(config_of(source), NUMBERED_VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not an index"),
        ({"shards_sha256": "0" * 64}, "shards.npy is not the one"),
        ({"num_documents": 10**400}, "damaged"),
        ({"num_tokens": 1}, "add up to"),
        ({"token_dtype": "float16"}, "token_dtype"),
        ({"eos_id": None}, None),
    ],
)
def test_a_changed_index_is_refused(
    change: dict[str, object], message: str | None, source: SourceConfig
) -> None:
    """In one line each; None: the entry is removed."""
    path = Path(source.path) / "index.json"
    if message is None:
        message = next(iter(change))
        change_index(path.parent, lambda contents: contents.pop(message))
    else:
        change_index(path.parent, lambda contents: contents.update(change))
    with pytest.raises(InputError, match=message) as error:
        read_index(source.path)
    one_line(error)
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(contents | {"eos_id": 1}), encoding="utf-8")
    with pytest.raises(InputError, match=r"its own digest differs|not an index|version"):
        read_index(source.path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_index(source.path)


def stored(reader: ShardReader, start: int, stop: int) -> list[int]:
    """Tokens [start, stop) of the second document."""
    shard = reader.shard(0)
    assert shard.dtype == np.uint16
    tokens: list[int] = np.frombuffer(shard.tokens(1, start, stop), shard.dtype).tolist()
    return tokens


def test_any_range_of_a_long_document_is_read_and_checked(make_numbered: MakeNumbered) -> None:
    """Around the edges of checksum chunks; a changed byte is found by the reads that touch it."""
    length = 2 * CHECKSUM_TOKENS + 100
    source = make_numbered([3, length], shard_tokens=10**6)
    text = numbered_documents([3, length])[1].astype(np.int64)
    reader = reader_of(source)
    edges = [0, 1, CHECKSUM_TOKENS - 1, CHECKSUM_TOKENS, CHECKSUM_TOKENS + 1, length - 1, length]
    for start in edges:
        for stop in [edge for edge in edges if edge >= start]:
            assert stored(reader, start, stop) == text[start:stop].tolist()
    tar = tar_path(reader.index, reader.index.shards[0])
    offset = int(reader.shard(0).table.rows["tokens_offset"][1]) + 2 * (CHECKSUM_TOKENS + 5)
    flip(tar, offset)
    assert stored(reader, 0, 100) == text[:100].tolist()
    with pytest.raises(DamagedDataError, match=r"document 1: .*checksum"):
        reader.shard(0).tokens(1, CHECKSUM_TOKENS + 50, CHECKSUM_TOKENS + 60)


def test_a_reader_keeps_few_files_open(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 shards must not need 100,000 descriptors."""
    monkeypatch.setattr("data_pipeline.reading.shards.KEPT_SHARDS", 2)
    monkeypatch.setattr("data_pipeline.reading.shards.KEPT_BYTES", 0)
    source = make_numbered([4] * 12, shard_tokens=4)
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc: descriptors cannot be counted; run on Linux")
    reader = reader_of(source)
    before = len(list(descriptors.iterdir()))
    for shard in range(12):
        reader.shard(shard).tokens(0, 0, 4)
    assert len(list(descriptors.iterdir())) == before + 2
    reader.close()
    assert len(list(descriptors.iterdir())) == before


def test_small_shards_of_a_large_block_are_all_kept(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than KEPT_SHARDS of them: their tables are read once, and not again and again."""
    source = make_numbered([4] * (KEPT_SHARDS + 8), shard_tokens=4)
    read: list[str] = []
    exact = LocalFolder.read_bytes

    def counted(self: LocalFolder, name: str) -> bytes:
        read.append(name)
        return exact(self, name)

    monkeypatch.setattr(LocalFolder, "read_bytes", counted)

    def tables_read(reader: ShardReader) -> int:
        read.clear()
        for shard in [*range(KEPT_SHARDS + 8)] * 2:
            reader.shard(shard)
        return len(read)

    assert tables_read(reader_of(source)) == KEPT_SHARDS + 8
    # the control: as many large tables would fill the memory, and go
    monkeypatch.setattr("data_pipeline.reading.shards.KEPT_BYTES", 0)
    assert tables_read(reader_of(source)) == 2 * (KEPT_SHARDS + 8)


def test_shards_of_all_sources_share_the_descriptors_of_a_process(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source keeps all of its shards at hand; their files are given back and opened again."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc: descriptors cannot be counted; run on Linux")
    monkeypatch.setattr("data_pipeline.reading.open_files.most_files", lambda: 5)
    monkeypatch.setattr("data_pipeline.reading.shards.OPEN_FILES", OpenFiles())
    source = make_numbered([4] * 12, shard_tokens=4)
    readers = [reader_of(source) for _ in range(3)]
    before = len(list(descriptors.iterdir()))
    expected = [readers[0].shard(shard).tokens(0, 0, 4) for shard in range(12)]
    for reader in readers * 2:
        assert [reader.shard(shard).tokens(0, 0, 4) for shard in range(12)] == expected
        assert before < len(list(descriptors.iterdir())) <= before + 5


def test_the_bound_on_files_follows_the_limit_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit, most in ((1024, 768), (256, 64), (40, 16), (-1, 2**20 - 256)):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert most_files() == most


def test_a_process_without_descriptors_is_told_so(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the storage that does not answer, and no pause mends it."""
    source = make_numbered([4], shard_tokens=4)
    reader = reader_of(source)
    reader.shard(0)

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(StorageError, match=r"too many open files; raise .* \(`ulimit -n`\)"):
        reader.shard(0).tokens(0, 0, 4)


def test_a_token_above_the_index_is_found_by_verify(source: SourceConfig) -> None:
    """An index that understates its largest token would pass a model that is too small."""
    change_index(Path(source.path), lambda contents: contents.update(max_token_id=3))
    assert any("above the largest" in p for p in verify_folder(read_index(source.path)))
