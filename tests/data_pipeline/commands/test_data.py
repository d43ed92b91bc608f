"""The commands end to end, as a user types them."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import read_index
from data_pipeline.commands.data import add_data_parser
from data_pipeline.errors import InputError
from data_pipeline.progress import say
from data_pipeline.tokenizer import load_tokenizer
from tests.support.damage import change_index
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl


def run(*words: str | Path) -> int:
    """Runs `megadlcm data WORDS`."""
    parser = argparse.ArgumentParser(prog="megadlcm")
    add_data_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["data", *map(str, words)])
    code: int = arguments.run(arguments)
    return code


def test_from_text_to_verified_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four commands; the table by domain is right; a changed byte makes verify fail."""
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""])
    source, tokenizer, folder = tmp_path / "*.jsonl", tmp_path / "t.json", tmp_path / "shards"
    options: Sequence[str | Path] = ("--input", source, "--output")
    assert run("tokenizer", *options, tokenizer, "--vocab-size", "280") == 0
    assert load_tokenizer(tokenizer).vocab_size == 280
    assert "280 entries" in capsys.readouterr().out
    assert run("prepare", *options, folder, "--tokenizer", tokenizer, "--skip-empty") == 0
    captured = capsys.readouterr()
    index = read_index(folder)
    rows = [line.split() for line in captured.out.splitlines()]
    assert rows[0] == ["domain", "documents", "tokens", "bytes", "bytes/token", "share"]
    assert [row[0] for row in rows[1:4]] == ["a", "b", "all"]
    ratio = f"{index.num_bytes / index.num_tokens:.2f}"
    expected = [str(len(TEXTS)), f"{index.num_tokens:,}", f"{index.num_bytes:,}", ratio, "100.0%"]
    assert rows[3][1:] == expected
    assert "1 empty" in captured.out
    assert "100%" in captured.err
    assert run("inspect", folder) == 0
    assert index.tokenizer_sha256 in capsys.readouterr().out
    assert run("verify", folder) == 0
    captured = capsys.readouterr()
    assert "all as written" in captured.out
    tar_bytes = sum(shard.tar_bytes for shard in index.shards)
    assert f"verify: 100%, {tar_bytes:,} bytes" in captured.err
    tar = folder / "shard-000000.tar"
    contents = bytearray(tar.read_bytes())
    contents[520] ^= 1
    tar.write_bytes(contents)
    with pytest.raises(InputError, match=r"problems found: 2; prepare it again"):
        run("verify", folder)
    digest, metadata = capsys.readouterr().out.splitlines()
    assert f"{tar}: sha256 differs" in digest and "document 0: its metadata" in metadata


def test_a_small_corpus_says_that_its_vocabulary_is_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for 5000 entries, a sentence cannot give them."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one two"])
    output = tmp_path / "new" / "tokenizer.json"
    assert run("tokenizer", "--input", source, "--vocab-size", "5000", "--output", output) == 0
    assert "no more than that" in capsys.readouterr().out


def test_verify_shows_how_far_it_is_inside_a_long_shard(
    make_shards: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line each time, here that is at every document; none goes back."""
    folder = make_shards()
    assert len(read_index(folder).shards) == 1
    capsys.readouterr()
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("data_pipeline.inspection.verify_shard.READ_BYTES", 1)
    assert run("verify", folder, "--workers", "1") == 0
    shares = re.findall(r"^verify: (\d+)%", capsys.readouterr().err, re.MULTILINE)
    assert len(shares) >= len(TEXTS) and len(set(shares)) > 2
    assert [int(share) for share in shares] == sorted(int(share) for share in shares)


def test_a_tokenizer_says_that_it_has_read_all_before_it_merges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merging can take minutes, in which nothing else is said."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    words = ("--input", source, "--vocab-size", "280", "--output", tmp_path / "t.json")
    assert run("tokenizer", *words) == 0
    read, merging = capsys.readouterr().err.splitlines()
    assert read.startswith(f"read: 100%, {len(TEXTS)} documents")
    assert merging.startswith("merging to 280 entries")


def test_links_that_were_left_out_are_reported(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both commands that read text."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.py").write_text("print(1)\n")
    (tree / "b.py").symlink_to("a.py")
    options = ("--input", tree, "--output")
    assert run("tokenizer", *options, tmp_path / "t.json", "--vocab-size", "280") == 0
    assert "left out: 1 symbolic links\n" in capsys.readouterr().out
    assert run("prepare", *options, tmp_path / "shards", "--tokenizer", tokenizer_file) == 0
    assert "left out: 1 symbolic links\n" in capsys.readouterr().out
    assert read_index(tmp_path / "shards").num_documents == 1


def test_a_tokenizer_replaces_a_file_only_on_request(
    tmp_path: Path, make_shards: Callable[..., Path]
) -> None:
    """That of finished shards not even then: nothing could read them any more."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: Sequence[str | Path] = ("--input", source, "--vocab-size", "280", "--output")
    output = tmp_path / "t.json"
    output.write_text("mine")
    with pytest.raises(InputError, match=r"t\.json: exists.*--overwrite") as error:
        run("tokenizer", *options, output)
    one_line(error)
    assert output.read_text() == "mine"
    assert run("tokenizer", *options, output, "--overwrite") == 0
    assert load_tokenizer(output).vocab_size == 280
    folder = make_shards()
    before = (folder / "tokenizer.json").read_bytes()
    for name in ("tokenizer.json", "other.json"):
        with pytest.raises(InputError, match="holds finished shards") as error:
            run("tokenizer", *options, folder / name, "--overwrite")
        one_line(error)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert not (folder / "other.json").exists()


def test_a_tokenizer_is_durable_when_the_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contents and its name: training one again may take hours."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    synced: list[int] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", counted)
    output = tmp_path / "new" / "t.json"
    assert run("tokenizer", "--input", source, "--vocab-size", "280", "--output", output) == 0
    assert synced == [output.stat().st_ino, output.parent.stat().st_ino]
    assert [path.name for path in output.parent.iterdir()] == ["t.json"]


@pytest.mark.parametrize("command", ["tokenizer", "prepare", "inspect", "verify"])
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example names the command itself."""
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert f"example:\n  megadlcm data {command}" in capsys.readouterr().out


def test_wrong_input_raises_the_error_the_command_line_prints(tmp_path: Path) -> None:
    """The one error class that becomes exit code 2."""
    with pytest.raises(InputError, match="does not exist"):
        run("inspect", tmp_path / "absent")
    with pytest.raises(InputError, match="does not exist"):
        run("verify", tmp_path / "absent")
    output = tmp_path / "new" / "t.json"
    with pytest.raises(InputError, match="matches no file"):
        run("tokenizer", "--input", tmp_path / "*.txt", "--vocab-size", "300", "--output", output)
    assert not output.parent.exists()


def test_a_name_from_the_data_forges_no_line_and_moves_no_cursor(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Domains, ids and file names may hold anything; it is shown, spelt out."""
    source = tmp_path / "a\x1b]0;b\u202e.jsonl"
    domain = "web\x1b[2J\nall 999\u202e"
    source.write_text(json.dumps({"text": "one two", "domain": domain, "id": domain}) + "\n")
    folder = tmp_path / "shards"
    assert run("prepare", "--input", source, "--tokenizer", tokenizer_file, "--output", folder) == 0
    assert run("inspect", folder) == 0

    def rename(index: dict[str, Any]) -> None:
        index["domains"][f"{domain}2"] = index["domains"].pop(domain)

    change_index(folder, rename)
    with pytest.raises(InputError, match="problems found"):
        run("verify", folder)
    shown = capsys.readouterr()
    assert shown.out.count("web\\x1b[2J\\nall 999\\u202e") == 4
    assert "domain web\\x1b[2J\\nall 999\\u202e2: documents" in shown.out
    for text in (shown.out, shown.err):
        assert all(line.isprintable() for line in text.split("\n"))
    say(f"{source}: said")
    assert capsys.readouterr().err == f"{tmp_path}/a\\x1b]0;b\\u202e.jsonl: said\n"
