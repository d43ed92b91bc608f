"""What a directory holds is never taken for something else: records are no source code."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import read_documents
from data_pipeline.prepare.formats.format import InputFile
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress
from tests.support.tiny_shards import one_line

LINES = b'{"text": "one"}\n{"text": "two", "id": 7}\n'


def texts_of(pattern: Path | str) -> list[str]:
    """The texts of the documents of a pattern."""
    files = find_inputs([str(pattern)], Counter())
    return [document.text for document in read_documents(files, ReadProgress(), Counter())]


def put(root: Path, name: str, contents: bytes) -> None:
    """Writes a file and the folders above it."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(contents)


@pytest.mark.parametrize(
    ("name", "glob"),
    [
        ("c4-train.00000-of-01024.json.gz", "*.json.gz"),
        ("en/0000.json.gz", "**/*.json.gz"),
        ("en/0000.jsonl", "**/*.jsonl"),
        ("en/deep/0000.parquet", "**/*.parquet"),
        ("0000.json", "*.json"),
        ("en/0000.ndjson.zst", "**/*.ndjson.zst"),
        ("en/0000.txt.gz", "**/*.txt.gz"),
        ("A.JSONL", "*.JSONL"),
        ("A.Json.GZ", "*.Json.GZ"),
    ],
)
def test_a_directory_of_records_is_refused_with_the_glob_that_reads_them(
    name: str, glob: str, tmp_path: Path
) -> None:
    """Beside a README, which alone would have been the whole corpus."""
    root = tmp_path / "corpus"
    put(root, "README.md", b"# corpus\n")
    put(root, name, LINES)
    if name.lower().endswith(".gz"):
        put(root, name, gzip.compress(LINES))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), root / name)
    with pytest.raises(InputError, match=f"it holds {name}; write --input") as error:
        find_inputs([str(root)], Counter())
    advised = re.findall(r"--input '([^']+)'", one_line(error))
    assert advised == [f"{root}/{glob}"]
    if not name.endswith(".zst"):
        expected = [LINES.decode()] if ".txt" in name else ["one", "two"]
        assert texts_of(advised[0]) == expected
    (root / name).unlink()
    assert texts_of(root) == ["# corpus\n"]


LISTED = json.dumps([{"text": "one"}, {"text": "two"}], indent=2).encode()
CONVERT = r"convert it to \.jsonl"


@pytest.mark.parametrize(
    ("name", "contents", "way_out"),
    [
        ("part-00000", LINES, r"rename it to end in \.jsonl"),
        ("a.jsonl.1", LINES, r"rename it to end in \.jsonl"),
        ("a.jsonl.gz.1", gzip.compress(LINES, mtime=0), r"rename it to end in \.jsonl\.gz"),
        ("a.jsonl-20240131.bak", LINES, r"rename it to end in \.jsonl"),
        ("a.json~", LINES, r"rename it to end in \.json"),
        ("data.json", b'\xef\xbb\xbf{"text": "one"}\n', r"write --input '.*/\*\.json'"),
        ("data.json", b'{"text": null}\n{"text": "one"}\n', r"write --input '.*/\*\.json'"),
        ("data.json", b'{"url": "u", "text": "' + b"long " * 20_000 + b'"}\n', "write --input"),
        ("data.json", b'{"content": "one"}\n{"content": "two"}\n', "rename the field .* `text`"),
        ("data.json", LISTED, CONVERT),
        ("data.json", b'{"v": 1, "data": ' + LISTED + b"}", CONVERT),
        ("data.json", b'{"data": [{"text": "' + b"long " * 20_000 + b'"}]}', CONVERT),
        ("a.csv", b'id,"Text"\n1,one\n', CONVERT),
        ("a.TSV", b"content\tid\none\t1\n", CONVERT),
        ("data.jsonl.xz", b"\xfd7zXZ\0", r"compress it with gzip or zstd instead of \.xz to read"),
        ("deep/data.json.bz2", b"BZh9", r"compress it with gzip or zstd instead of \.bz2 to read"),
    ],
)
def test_records_of_another_name_are_known_by_their_beginning(
    name: str, contents: bytes, way_out: str, tmp_path: Path
) -> None:
    put(tmp_path, name, contents)
    with pytest.raises(InputError, match=f"it holds {name}; {way_out}") as error:
        find_inputs([str(tmp_path)], Counter())
    one_line(error)


def test_a_list_that_is_read_as_lines_says_how_to_convert_it(tmp_path: Path) -> None:
    for contents in (LISTED, b'[{"text": "one"}]'):
        put(tmp_path, "a.json", contents)
        with pytest.raises(InputError, match=r"a\.json:1: .*jq -c '\.\[\]'") as error:
            texts_of(tmp_path / "a.json")
        one_line(error)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for pattern in ("a.jsonl", "*.jsonl"):
        with pytest.raises(InputError, match=r"a\.jsonl: is no ordinary file") as error:
            find_inputs([str(tmp_path / pattern)], Counter())
        one_line(error)
    # one that takes the place of a file is not waited for either
    late = InputFile(tmp_path / "a.jsonl", "a.jsonl", 1)
    with pytest.raises(InputError, match="is no ordinary file"):
        list(read_documents([late], ReadProgress(), Counter()))


@pytest.mark.parametrize(
    "contents",
    [
        b'{\n "name": "package",\n "text": "it is"\n}\n',
        b'{"name": "package", "version": "1.0"}\n',
        b'[{"name": "package"}]',
        b'{"text": 5}',
        b'{"text": "cut',
        b'{"content": "one"}',
        b'{"name": "a", "files": ["b"], "people": [{"name": "c"}]}',
        b'{\n "messages": [{"role": "user", "content": "text"}]\n}',
        b"text",
        b"",
        b"\xff\xfe",
    ],
)
def test_the_json_of_a_source_tree_stays_a_file_of_it(contents: bytes, tmp_path: Path) -> None:
    put(tmp_path, "pack/a.json", contents)
    put(tmp_path, "pack/a.json.orig", contents)
    put(tmp_path, "Makefile", b"all:\n")
    put(tmp_path, "rates.csv", b"day,rate\n1,2\n")
    assert len(find_inputs([str(tmp_path)], Counter())) == 4


def test_a_file_of_an_unknown_ending_is_not_sent_to_be_read_as_text(tmp_path: Path) -> None:
    put(tmp_path, "a.csv", b"text\none\n")
    with pytest.raises(InputError, match=r"convert or rename it, or, if it is source") as error:
        find_inputs([str(tmp_path / "*.csv")], Counter())
    one_line(error)
