"""Parquet rows are the documents that the same records are as JSON lines."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import read_documents
from data_pipeline.prepare.formats import fields, parquet
from data_pipeline.prepare.formats.format import TextDocument
from data_pipeline.prepare.formats.parquet import BATCH_ROWS
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import PIECE_BYTES, ReadProgress, read_pieces
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl


def read(path: Path) -> list[TextDocument]:
    """Reads the documents of one file."""
    files = find_inputs([str(path)], Counter())
    return list(read_documents(files, ReadProgress(), Counter()))


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    """Writes columns as a Parquet file."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def columns_of(texts: list[str]) -> dict[str, list[str]]:
    """What write_jsonl writes, by column."""
    numbers = range(len(texts))
    return {
        "unused": ["x"] * len(texts),
        "id": [f"d{number}" for number in numbers],
        "text": texts,
        "domain": ["ab"[number % 2] for number in numbers],
        "source": ["here"] * len(texts),
    }


@pytest.mark.parametrize("group", [1, 7, 10_000])
def test_rows_are_the_documents_that_lines_are(group: int, tmp_path: Path) -> None:
    """Of many row groups or one, more rows than are decoded at once."""
    texts = [f"{number} {text}" for number, text in enumerate(TEXTS * 60)]
    assert len(texts) > BATCH_ROWS
    lines = read(write_jsonl(tmp_path / "a.jsonl", texts))
    rows = read(write(tmp_path / "a.parquet", columns_of(texts), row_group_size=group))
    for line, row in zip(lines, rows, strict=True):
        assert (line.id, line.domain, line.source, line.text, line.num_bytes) == (
            (row.id, row.domain, row.source, row.text, row.num_bytes)
        )
    assert rows[10].origin == f"{tmp_path / 'a.parquet'}: row 11"


def test_only_the_texts_are_needed_whatever_their_type(tmp_path: Path) -> None:
    """Large strings, dictionaries; numbers as ids; null and absent columns are filled in."""
    for number, kind in enumerate(
        (
            pyarrow.string(),
            pyarrow.large_string(),
            pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        )
    ):
        path = tmp_path / f"{number}.parquet"
        texts = pyarrow.array(["one", "two", "one"]).cast(kind)
        found = read(write(path, {"text": texts, "id": [7, None, 9]}))
        assert [document.text for document in found] == ["one", "two", "one"]
        assert [document.id for document in found] == ["7", f"{path.name}:2", "9"]
        assert {(d.domain, d.source) for d in found} == {("text", path.name)}
    assert (
        read(write(tmp_path / "none.parquet", {"text": pyarrow.array([], pyarrow.string())})) == []
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["x"]}, r"no column `text`.*it has: content"),
        ({"text": [1, 2]}, r"column `text` holds int64, must hold strings"),
        (
            {"text": ["fine", None]},
            r"a\.parquet: row 2: document .* is empty \(or null\).*--skip-empty",
        ),
        (
            {"text": pyarrow.array([b"fine", b"fine", b"caf\xe9"]).view(pyarrow.string())},
            r"a\.parquet: row 3: byte 3 of a value is not UTF-8",
        ),
    ],
)
def test_a_bad_column_or_row_is_named(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """File, row, rule, way out."""
    path = write(tmp_path / "a.parquet", columns, row_group_size=2)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    one_line(error)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Cut anywhere, no Parquet at all, a byte of a text changed: never another corpus."""
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    path = write(tmp_path / "a.parquet", {"text": TEXTS * 5}, **options)
    whole = path.read_bytes()
    assert len(read(path)) == len(TEXTS) * 5
    cut = (whole[:at] for at in range(0, len(whole), 97))
    texts = whole.index(b"The cat")
    places = range(texts, texts + 300, 7)
    changed = (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places)
    for contents in (*cut, b"no parquet", *changed):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=r"a\.parquet: ") as error:
            read(path)
        one_line(error)


def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """Which of two texts is meant nobody knows; what is not read may repeat itself."""
    path = tmp_path / "a.parquet"
    for name in ("text", "id", "unused"):
        arrays = [pyarrow.array([each]) for each in ("one", "x", "y")]
        table = pyarrow.Table.from_arrays(arrays, names=["text", name, name])
        pyarrow.parquet.write_table(table, path)
        if name == "unused":
            assert [document.text for document in read(path)] == ["one"]
            continue
        with pytest.raises(InputError, match=rf"a\.parquet: has `{name}` \d times") as error:
            read(path)
        one_line(error)


@pytest.mark.parametrize("name", ["text", "id", "domain", "source"])
@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([b"web"]),
        pyarrow.array([["web"]]),
        pyarrow.array([{"k": 1}]),
        pyarrow.array([True]),
    ],
    ids=["binary", "list", "struct", "bool"],
)
def test_a_column_of_what_is_no_name_is_refused(
    name: str, values: pyarrow.Array, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["one"]} | {name: values})
    with pytest.raises(InputError, match=rf"column `{name}` holds .*must hold strings") as error:
        read(path)
    one_line(error)


def test_times_have_a_spelling_or_are_refused(tmp_path: Path) -> None:
    """Of a year that no calendar has, of half a microsecond, of a zone that nobody knows."""
    path = tmp_path / "a.parquet"
    for kind, number in (
        (pyarrow.timestamp("us"), 1 << 62),
        (pyarrow.timestamp("ns"), 1),
        (pyarrow.timestamp("us", tz="Mars/Olympus"), 1),
    ):
        times = pyarrow.array([0, number], pyarrow.int64()).cast(kind)
        write(path, {"text": ["one", "two"], "id": times})
        with pytest.raises(InputError, match=r"row [12]: a value that has no spelling") as error:
            read(path)
        one_line(error)
    write(path, {"text": ["one"], "id": pyarrow.array([1], pyarrow.timestamp("us"))})
    assert read(path)[0].id == "1970-01-01 00:00:00.000001"


def test_a_null_text_is_an_empty_one(tmp_path: Path) -> None:
    files = find_inputs([str(write(tmp_path / "a.parquet", {"text": ["x", None]}))], Counter())
    left_out: Counter[str] = Counter()
    found = list(read_documents(files, ReadProgress(), left_out, skip_empty=True))
    assert ([document.text for document in found], left_out) == (["x"], {"empty": 1})


def test_a_text_that_a_small_file_repeats_comes_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kilobyte may hold gigabytes; a piece is no larger than one row more than asked for."""
    text, rows = "a" * 100_000, 200
    indices = pyarrow.array([0] * rows, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    path = write(tmp_path / "a.parquet", {"text": texts, "id": list(range(rows))})
    assert path.stat().st_size < 20_000
    files = find_inputs([str(path)], Counter())
    pieces = list(read_pieces(files, ReadProgress()))
    assert sum(piece.num_records for piece in pieces) == rows
    assert max(len(piece.contents) for piece in pieces) < PIECE_BYTES + 2 * len(text)
    assert [len(document.text) for document in read(path)] == [len(text)] * rows
    monkeypatch.setattr(fields, "RECORD_BYTES", 99_999)
    texts = ["fine"] * 3 + [text]
    for columns in ({"text": texts}, {"text": ["fine"] * 4, "id": texts}):
        write(path, columns, row_group_size=3)
        with pytest.raises(InputError, match=r"a\.parquet: row 4: a record of more") as error:
            read(path)
        one_line(error)


def test_large_rows_are_decoded_in_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 different texts of megabytes are no batch."""
    monkeypatch.setattr(parquet, "DECODED_BYTES", 1 << 16)
    texts = [f"{number}".ljust(10_000) for number in range(40)]
    path = write(tmp_path / "a.parquet", {"text": texts}, use_dictionary=False)
    counted: list[int] = []
    ends = parquet._ends

    def counting(path: Path, batch: pyarrow.RecordBatch, row: int) -> object:
        counted.append(batch.num_rows)
        return ends(path, batch, row)

    monkeypatch.setattr(parquet, "_ends", counting)
    assert [document.text for document in read(path)] == texts
    assert sum(counted) == 40 and 1 < max(counted) <= 6


def test_a_row_group_that_unpacks_to_far_more_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different texts of megabytes in a page of kilobytes; in small row groups they are read."""
    monkeypatch.setattr(parquet, "REPEATED_BYTES", 1 << 20)
    texts = [f"{number}".ljust(100_000) for number in range(40)]
    options = {"use_dictionary": False, "compression": "zstd"}
    path = write(tmp_path / "a.parquet", {"text": texts}, **options)
    with pytest.raises(InputError, match=r"a\.parquet: row group 1: .* unpack to 4,0") as error:
        read(path)
    one_line(error)
    write(path, {"text": texts}, row_group_size=8, **options)
    assert [document.text for document in read(path)] == texts


def test_a_large_row_group_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Only a small one is read as dictionaries, which grow to the end of the group."""
    texts = [f"{number} {random.Random(number).randbytes(4000).hex()}" for number in range(10_000)]
    path = write(tmp_path / "a.parquet", {"text": texts})
    before = pyarrow.total_allocated_bytes()
    files = find_inputs([str(path)], Counter())
    most = max(pyarrow.total_allocated_bytes() for _ in read_pieces(files, ReadProgress()))
    assert sum(map(len, texts)) > parquet.REPEATED_BYTES
    assert most - before < 48 << 20
