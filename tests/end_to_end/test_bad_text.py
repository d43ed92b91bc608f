"""Wrong text, tokenizers and folders: `megadlcm data` says in one line what to do about them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import read_index
from megadlcm.commands.main import main

Refused = Callable[..., str]  # function(*words) -> the line that `megadlcm WORDS` says


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"text": ""}', ["text.jsonl:2", "is empty", "at least one token", "--skip-empty"]),
        ('{"text": "a"', ["text.jsonl:2", "not JSON", "fix or remove the line"]),
        ('{"txt": "a"}', ["text.jsonl:2", "(it has: txt)", "add or rename the field"]),
        ('{"text": 5}', ["text.jsonl:2", "text = '5'", "string"]),
        ('["a"]', ["text.jsonl:2", "a list, must be an object"]),
        ('{"text": "\\ud800"}', ["text.jsonl:2", "half a surrogate pair"]),
    ],
)
def test_a_document_that_is_none_is_named_by_file_and_line(
    corpus: Path, refused: Refused, tmp_path: Path, line: str, named: list[str]
) -> None:
    """What is left behind is no shard folder."""
    text, output = tmp_path / "text.jsonl", tmp_path / "shards"
    text.write_text(f'{{"text": "the cat"}}\n{line}\n{{"text": "sat"}}\n')
    options = ("--input", text, "--tokenizer", corpus / "tokenizer.json", "--output", output)
    said = refused("data", "prepare", *options)
    assert [part for part in named if part not in said] == []
    assert "has no index.json" in refused("data", "inspect", output)


def test_an_empty_document_may_be_left_out_and_is_counted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.jsonl", tmp_path / "shards"
    text.write_text('{"text": ""}\n{"text": "the cat"}\n')
    options = ("--input", text, "--tokenizer", corpus / "tokenizer.json", "--output", output)
    assert main([str(word) for word in ("data", "prepare", *options, "--skip-empty")]) == 0
    assert "left out: 1 empty" in capsys.readouterr().out
    assert read_index(output).num_documents == 1


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--tokenizer", "absent.json", ["absent.json: no such file", "data tokenizer"]),
        ("--tokenizer", "text.jsonl", ["text.jsonl: not a tokenizer.json", "data tokenizer"]),
        ("--input", "absent*", ["absent*: matches no file", "check the pattern"]),
        ("--input", "empty.jsonl", ["no documents in 1 files", "check the pattern"]),
        ("--input", "picture.png", ["picture.png", ".jsonl", "source code"]),
        ("--output", "text.jsonl", ["text.jsonl: is a file, must be a folder", "another name"]),
        ("--output", "text.jsonl/below", ["must be a folder that can be written to"]),
        ("--output", "finished", ["holds finished shards", "--overwrite"]),
        ("--shard-tokens", "0", ["--shard-tokens: 0", ">= 1"]),
        ("--shard-tokens", "many", ["--shard-tokens: many must be an integer"]),
        ("--workers", "0", ["--workers: 0", ">= 1"]),
    ],
)
def test_a_wrong_option_of_prepare_is_one_line(
    corpus: Path,
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    named: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text('{"text": "the cat"}\n')
    Path("empty.jsonl").touch()
    Path("picture.png").touch()
    options = {
        "--input": "text.jsonl",
        "--tokenizer": str(corpus / "tokenizer.json"),
        "--output": "finished",
    }
    words = [word for pair in options.items() for word in pair]
    assert main(["data", "prepare", *words]) == 0  # so far nothing is wrong
    # other shards than those of `finished`: the same ones would only be finished already
    options = options | {"--output": "shards", "--shard-tokens": "9"} | {option: value}
    said = refused("data", "prepare", *(word for pair in options.items() for word in pair))
    assert [part for part in named if part not in said] == []


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--vocab-size", "256", ["--vocab-size 256", ">= 257", "choose a larger one"]),
        ("--output", ".", ["--output .: is a folder, must be a file"]),
        ("--output", "text.jsonl/t.json", ["must be a folder that can be written to"]),
        ("--input", "empty.jsonl", ["no documents to train on", "check the pattern"]),
    ],
)
def test_a_wrong_option_of_tokenizer_is_one_line(
    refused: Refused,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    named: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text('{"text": "the cat"}\n')
    Path("empty.jsonl").touch()
    options = {"--input": "text.jsonl", "--vocab-size": "300", "--output": "t.json"}
    options[option] = value
    said = refused("data", "tokenizer", *(word for pair in options.items() for word in pair))
    assert [part for part in named if part not in said] == []
    assert sorted(os.listdir()) == ["empty.jsonl", "text.jsonl"]


@pytest.mark.parametrize(
    "words",
    [
        ["data", "prepare", "--output", "a", "--input", "b", "--output", "c"],
        ["data", "tokenizer", "--vocab-size", "300", "--vocab-size", "300"],
        ["plan", "run.yaml", "--nodes", "2", "--nodes", "4"],
    ],
)
def test_an_option_given_twice_is_refused(refused: Refused, words: list[str]) -> None:
    """One of the values would be lost without a word."""
    assert f"{words[-2]} is given twice, must be given once; remove one" in refused(*words)


def test_an_input_given_twice_is_two_inputs(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[str | Path] = ["data", "prepare", "--tokenizer", corpus / "tokenizer.json"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the cat")
        words += ["--input", tmp_path / f"{name}.txt"]
    assert main([str(word) for word in [*words, "--output", tmp_path / "shards"]]) == 0
    assert read_index(tmp_path / "shards").num_documents == 2
