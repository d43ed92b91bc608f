"""Parquet rows are the documents that the same records are as JSON lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import read_documents
from data_pipeline.prepare.formats.format import TextDocument
from data_pipeline.prepare.formats.parquet import BATCH_ROWS
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress
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
        ({"text": ["fine", None]}, r"a\.parquet: row 2: text is null"),
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
