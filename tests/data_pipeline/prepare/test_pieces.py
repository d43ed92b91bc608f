"""Pieces hold every record once, cut at the ends of records, from any position on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.errors import InputError, StorageError
from data_pipeline.prepare import pieces as pieces_module
from data_pipeline.prepare.documents import piece_documents
from data_pipeline.prepare.formats.format import BEGINNING, InputFile, Piece, Position, TextDocument
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress, read_pieces
from tests.support.tiny_shards import one_line

LINES = [json.dumps({"text": f"{number} " + "word " * (number * 7 % 40)}) for number in range(60)]
LINES[3] = LINES[20] = LINES[21] = ""
ENDINGS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def write(path: Path, lines: list[str]) -> None:
    """Writes lines in the format that the name says; blank ones are no rows."""
    plain = "\n".join(lines).encode()  # the last line has no newline
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines if line]})
        pyarrow.parquet.write_table(table, path, row_group_size=9)
    elif path.suffix == ".gz":
        half = len(plain) // 2
        path.write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    elif path.suffix == ".zst":
        half = len(plain) // 2
        path.write_bytes(zstandard.compress(plain[:half]) + zstandard.compress(plain[half:]))
    else:
        path.write_bytes(plain)


@pytest.fixture
def files(tmp_path: Path) -> list[InputFile]:
    """A text, the same lines in every format, an empty file, and a text."""
    (tmp_path / "a.txt").write_text("first")
    for number, ending in enumerate(ENDINGS):
        write(tmp_path / f"b{number}.{ending}", LINES)
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"last"))
    return find_inputs([str(tmp_path / "*")], Counter())


def numbered(pieces: list[Piece]) -> list[tuple[int, str]]:
    """The number of each record and its text."""
    return [
        (number, found.text if isinstance(found, TextDocument) else found)
        for piece in pieces
        for number, found in piece_documents(piece, None)
    ]


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_every_record_is_there_once_whatever_the_size(
    size: int, files: list[InputFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers go up by one for each line, row or file; blank lines have one, too."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", size)
    progress = ReadProgress()
    pieces = list(read_pieces(files, progress))
    assert progress.done_bytes == sum(file.num_bytes for file in files)
    assert (len(pieces) > 100) == (size < 1000)
    end = 0
    for piece in pieces:
        assert piece.start.number == end
        end = piece.end_number
    texts = [json.loads(line)["text"] for line in LINES if line]
    assert [text for _, text in numbered(pieces)] == ["first", *texts * len(ENDINGS), "last"]
    assert end == 2 + 3 * len(LINES) + len(texts)


@pytest.mark.parametrize("size", [50, 1000])
def test_reading_goes_on_from_every_record(
    size: int, files: list[InputFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what lies before had been read; no file before it is opened."""
    whole = numbered(list(read_pieces(files, ReadProgress())))
    starts = {BEGINNING}
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 1)
    for piece in read_pieces(files, ReadProgress()):
        file, record, number = piece.start
        starts |= {Position(file, record + at, number + at) for at in range(piece.num_records)}
    assert len(starts) == whole[-1][0] + 1
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", size)
    for start in sorted(starts):
        progress = ReadProgress()
        rest = list(read_pieces(files, progress, start))
        assert numbered(rest) == [found for found in whole if found[0] >= start.number]
        assert rest[0].start == start
        assert progress.done_bytes == sum(file.num_bytes for file in files)
    end = Position(len(files), 0, whole[-1][0] + 1)
    assert list(read_pieces(files, ReadProgress(), end)) == []


def test_a_file_before_the_position_need_not_be_there(files: list[InputFile]) -> None:
    """And one behind it must be."""
    files[0].path.unlink()
    assert next(read_pieces(files, ReadProgress(), Position(1, 0, 1))).start == (1, 0, 1)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(No such file") as error:
        list(read_pieces(files, ReadProgress()))
    one_line(error)


def test_a_failing_read_is_the_storages_fault(
    files: list[InputFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the input: another start may succeed."""

    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_pipeline.prepare.formats.text.plain_chunks", failing)
    with pytest.raises(StorageError, match=r"a\.txt: cannot be read \(Input/output error") as error:
        list(read_pieces(files, ReadProgress()))
    one_line(error)
