"""Every input format in a fixed order; every flaw named with its file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from data_pipeline.errors import InputError
from data_pipeline.prepare.documents import describe_left_out, read_documents
from data_pipeline.prepare.formats.format import TextDocument
from data_pipeline.prepare.inputs import find_inputs
from data_pipeline.prepare.pieces import ReadProgress
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl


def read(*patterns: Path | str, **options: object) -> list[TextDocument]:
    """Reads all documents of the patterns."""
    return read_and_count(*patterns, **options)[0]


def read_and_count(
    *patterns: Path | str, **options: object
) -> tuple[list[TextDocument], Counter[str]]:
    """Reads all documents of the patterns, and says what was left out."""
    left_out: Counter[str] = Counter()
    progress = ReadProgress()
    files = find_inputs([str(pattern) for pattern in patterns], left_out)
    documents = list(read_documents(files, progress, left_out, **options))
    assert progress.done_bytes == sum(file.path.stat().st_size for file in files)
    return documents, left_out


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
    found, left_out = read_and_count(root)
    assert [d.id for d in found] == ["project/pack/a.py", "project/z.py"]
    assert {(d.domain, d.source) for d in found} == {("code", "project")}
    assert left_out == {"binary": 2}
    assert {d.domain for d in read(root, domain="python")} == {"python"}


def test_links_of_a_source_tree_are_left_out_and_counted(tmp_path: Path) -> None:
    """To a file of the tree, a folder of it, a file elsewhere, nowhere; hidden ones are not met."""
    root = tmp_path / "project"
    (root / "pack").mkdir(parents=True)
    (root / "pack" / "a.py").write_text("# a\n")
    (tmp_path / "elsewhere.py").write_text("# elsewhere\n")
    for link, target in {
        "again.py": "pack/a.py",
        "folder": "pack",
        "pack/up": "..",
        "other.py": "../elsewhere.py",
        "broken.py": "absent.py",
        ".hidden.py": "pack/a.py",
    }.items():
        (root / link).symlink_to(target)
    found, left_out = read_and_count(root)
    assert [d.id for d in found] == ["project/pack/a.py"]
    assert describe_left_out(left_out) == "5 symbolic links"
    # a link that was asked for by name is the file it leads to
    assert [d.text for d in read(link_to(root, tmp_path / "link"))] == ["# a\n"]
    with pytest.raises(InputError, match="matched twice"):
        find_inputs([str(root), str(tmp_path / "link")], Counter())


def link_to(target: Path, link: Path) -> Path:
    """Makes a link and returns it."""
    link.symlink_to(target)
    return link


def test_a_name_that_is_not_utf8_is_named_with_its_file(tmp_path: Path) -> None:
    """Of a file in a source tree, of a .txt file; a binary file of that name is left out as any."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "a.py").write_text("# a\n")
    bad = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt"))
    try:
        bad.write_bytes(b"a\0b")
    except OSError:
        pytest.skip("this file system has no names but UTF-8; run on Linux")
    assert [d.id for d in read(root)] == ["project/a.py"]
    bad.write_text("coffee")
    for pattern in (root, root / "*.txt"):
        with pytest.raises(InputError, match=r"caf\\udce9\.txt.*rename the file") as error:
            read(pattern)
        one_line(error).encode("utf-8")


def test_empty_documents_are_refused_or_counted(tmp_path: Path) -> None:
    """Nothing is left out quietly."""
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", "three"])
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*empty.*--skip-empty") as error:
        read(path)
    one_line(error)
    kept, left_out = read_and_count(path, skip_empty=True)
    assert [d.text for d in kept] == ["one", "three"]
    assert left_out == {"empty": 1}


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
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON that can be read.*5000 digits"),
        (b'{"text": "a", "id": "\\ud800"}', r"id = '\\ud800', UTF-8 cannot store.*fix the record"),
        (b'{"text": "a", "domain": "x\\udfff"}', r"domain = 'x\\udfff'.*its character 1"),
        (b'{"text": "a", "source": "\\ud800"}', r"source = '\\ud800'"),
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
            find_inputs([str(pattern) for pattern in patterns], Counter())
        one_line(error)
