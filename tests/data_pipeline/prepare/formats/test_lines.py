"""Lines that a careless reader would take for something else, and lines without an end."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import read_documents
from data_pipeline.prepare.formats import fields
from data_pipeline.prepare.formats.format import TextDocument
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress
from tests.support.tiny_shards import one_line

BOM = b"\xef\xbb\xbf"


def read(path: Path, left_out: Counter[str] | None = None) -> list[TextDocument]:
    """Reads the documents of one file; leaves empty ones out where they are to be counted."""
    files = find_inputs([str(path)], Counter())
    counted = Counter() if left_out is None else left_out
    skip = left_out is not None
    return list(read_documents(files, ReadProgress(), counted, skip_empty=skip))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """At the beginning, and where files were joined; inside of a text it is a character."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"text": "one"}\n' + BOM + b'{"text": "\\ufefftwo"}\n' + BOM + b"\n")
    assert [document.text for document in read(path)] == ["one", "\ufefftwo"]


def test_a_null_text_is_an_empty_one(tmp_path: Path) -> None:
    """Refused, or left out and counted; a missing text is neither."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*null.*--skip-empty") as error:
        read(path)
    one_line(error)
    left_out: Counter[str] = Counter()
    assert [document.text for document in read(path, left_out)] == ["one"]
    assert left_out == {"empty": 2}
    path.write_text('{"text": "one"}\n{"texts": null}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: text.*it has: texts"):
        read(path, left_out)


def test_a_field_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    """Of two texts one would be lost; what is not read may repeat itself."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "a": 1, "a": 2, "b": {"text": 1, "text": 2}}\n')
    assert [document.text for document in read(path)] == ["one"]
    for name in fields.FIELDS:
        path.write_text(f'\n{{"text": "one", "{name}": "x", "{name}": "two"}}\n')
        with pytest.raises(InputError, match=rf"a\.jsonl:2: has `{name}` \d times") as error:
            read(path)
        one_line(error)


@pytest.mark.parametrize("value", ['["web"]', '{"k": 1}', "true", "NaN"])
@pytest.mark.parametrize("name", ["id", "domain", "source"])
def test_a_name_is_a_string_or_a_number(name: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one", "{name}": {value}}}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl:1: {name} = .*must be a string or") as error:
        read(path)
    one_line(error)
    for number in ("7", "-1.5", '"7"'):
        path.write_text(f'{{"text": "one", "{name}": {number}}}\n')
        assert getattr(read(path)[0], name) == number.strip('"')


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_without_an_end_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small its file; one that is just as long as it may be is read."""
    monkeypatch.setattr(fields, "RECORD_BYTES", 1 << 21)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    frame = len(b'{"text": ""}')
    for length in ((1 << 21) - frame, (1 << 21) - frame + 1, 1 << 23):
        line = b'{"text": "' + b"a" * length + b'"}\n'
        for tail in (b"", b'{"text": "behind"}\n'):
            (tmp_path / name).write_bytes(pack(b'\n{"text": "fine"}\n' + line + tail))
            if length + frame <= 1 << 21:
                assert len(read(tmp_path / name)) == 2 + bool(tail)
                continue
            with pytest.raises(
                InputError, match=rf"{name}:3: a record of more than 2,097"
            ) as error:
                read(tmp_path / name)
            one_line(error)
