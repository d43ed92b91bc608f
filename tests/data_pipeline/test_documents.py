"""Every input format in a fixed order; every flaw named with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_pipeline.documents import ReadCounts, TextDocument, find_inputs, read_documents
from data_pipeline.errors import InputError
from tests.tiny_shards import TEXTS, one_line, write_jsonl


def read(*patterns: Path | str, **options: object) -> list[TextDocument]:
    """Reads all documents of the patterns."""
    files = find_inputs([str(pattern) for pattern in patterns])
    return list(read_documents(files, ReadCounts(), **options))


def test_plain_gzip_and_zstd_lines_are_the_same_documents(tmp_path: Path) -> None:
    """Fields are kept, bytes are counted in UTF-8; zstd also in several frames."""
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    contents = plain.read_bytes()
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    half = len(contents) // 2
    frames = [zstandard.compress(part) for part in (contents[:half], contents[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    expected = [(f"d{n}", "ab"[n % 2], "here", text) for n, text in enumerate(TEXTS)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        found = read(tmp_path / name)
        assert [(d.id, d.domain, d.source, d.text) for d in found] == expected
        assert [d.num_bytes for d in found] == [len(text.encode()) for text in TEXTS]


def test_missing_fields_are_filled_from_where_the_record_stood(tmp_path: Path) -> None:
    """Names do not tell where the corpus lay; a last line without newline and blank lines count."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 7}')
    for options, domain in [({}, "text"), ({"domain": "web"}, "web")]:
        first, second = read(f"{tmp_path}/**/*.jsonl", **options)
        assert (first.id, first.source, first.domain) == ("deep/b.jsonl:1", "deep/b.jsonl", domain)
        assert (second.id, second.text) == ("7", "two")


def test_a_text_file_is_one_document_and_paths_are_sorted(tmp_path: Path) -> None:
    """Line ends stay as they are."""
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    found = read(tmp_path / "*.txt")
    assert [d.id for d in found] == ["a.txt", "b.txt", "c.txt"]
    assert found[0].text == "a.txt\r\n"
    assert [d.id for d in read(tmp_path / "c.txt", tmp_path / "a.txt")] == ["c.txt", "a.txt"]


def test_a_name_with_brackets_is_taken_as_it_is(tmp_path: Path) -> None:
    """A file that exists is no pattern."""
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert [d.text for d in read(tmp_path / "a[1].txt")] == ["one"]


def test_a_directory_is_a_source_tree(tmp_path: Path) -> None:
    """Binary files are counted, hidden ones and byte code are not even that."""
    root = tmp_path / "project"
    for name in ("z.py", "pack/a.py", ".git/config", "pack/__pycache__/a.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "nul.bin").write_bytes(b"a\0b")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    counts = ReadCounts()
    found = list(read_documents(find_inputs([str(root)]), counts))
    assert [d.id for d in found] == ["project/pack/a.py", "project/z.py"]
    assert {(d.domain, d.source) for d in found} == {("code", "project")}
    assert counts.skipped_binary == 2
    assert counts.done_bytes == counts.total_bytes
    assert {d.domain for d in read(root, domain="python")} == {"python"}


def test_empty_documents_are_refused_or_counted(tmp_path: Path) -> None:
    """Nothing is left out quietly."""
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", "three"])
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*empty.*--skip-empty") as error:
        read(path)
    one_line(error)
    counts = ReadCounts()
    kept = list(read_documents(find_inputs([str(path)]), counts, skip_empty=True))
    assert [d.text for d in kept] == ["one", "three"]
    assert counts.skipped_empty == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'["text"]', "a list, must be an object"),
        (b'{"content": "x"}', r"text.*it has: content"),
        (b'{"text": 5}', r"text = '5'"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    """File, line, rule, way out."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"text": "fine"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}") as error:
        read(path)
    one_line(error)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Cut gzip and zstd files would otherwise look like short ones."""
    text = json.dumps({"text": "word " * 5000}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text)[:-20])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text)[:-5])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd at all")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "b.jsonl.gz", "b.jsonl.zst"):
        with pytest.raises(InputError, match=f"{name}: damaged compressed file") as error:
            read(tmp_path / name)
        one_line(error)
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"a\.txt:3: byte 11 is not UTF-8"):
        read(tmp_path / "a.txt")


def test_patterns_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """No match, unknown ending, the same file twice, a folder of records read as a tree."""
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    for patterns, message in [
        ([tmp_path / "*.nothing"], "matches no file"),
        ([tmp_path / "a.pdf"], r"ends in none of \.txt"),
        ([tmp_path / "*.jsonl", tmp_path / "a.jsonl"], "matched twice"),
        ([tmp_path], r"a source tree, but it holds a\.jsonl"),
        ([tmp_path / "none"], "no files in this directory"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            find_inputs([str(pattern) for pattern in patterns])
        one_line(error)
