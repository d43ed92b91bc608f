"""The commands end to end, as a user types them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline import read_index
from data_pipeline.cli import add_data_parser
from data_pipeline.errors import InputError
from data_pipeline.tokenizer import load_tokenizer
from tests.tiny_shards import TEXTS, write_jsonl


def run(*words: str | Path) -> int:
    """Runs `megadlcm data WORDS`."""
    parser = argparse.ArgumentParser(prog="megadlcm")
    add_data_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["data", *map(str, words)])
    code: int = arguments.func(arguments)
    return code


def test_from_text_to_verified_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four commands; the table by domain is right; a changed byte makes verify fail with 2."""
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
    assert rows[0] == ["domain", "documents", "tokens", "bytes", "bytes/token"]
    assert [row[0] for row in rows[1:4]] == ["a", "b", "all"]
    ratio = f"{index.num_bytes / index.num_tokens:.2f}"
    expected = [str(len(TEXTS)), f"{index.num_tokens:,}", f"{index.num_bytes:,}", ratio]
    assert rows[3][1:] == expected
    assert "1 empty" in captured.out
    assert "100%" in captured.err
    assert run("inspect", folder) == 0
    assert index.tokenizer_sha256 in capsys.readouterr().out
    assert run("verify", folder) == 0
    assert "all as written" in capsys.readouterr().out
    tar = folder / "shard-000000.tar"
    contents = bytearray(tar.read_bytes())
    contents[600] ^= 1
    tar.write_bytes(contents)
    assert run("verify", folder) == 2
    assert "shard-000000.tar" in capsys.readouterr().err


def test_a_small_corpus_says_that_its_vocabulary_is_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for 5000 entries, a sentence cannot give them."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one two"])
    output = tmp_path / "new" / "tokenizer.json"
    assert run("tokenizer", "--input", source, "--vocab-size", "5000", "--output", output) == 0
    assert "no more than that" in capsys.readouterr().out


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
    with pytest.raises(InputError, match="matches no file"):
        run("tokenizer", "--input", tmp_path / "*.txt", "--vocab-size", "300", "--output", "x")
