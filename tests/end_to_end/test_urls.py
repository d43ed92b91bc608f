"""A URL where a command takes local paths alone is refused, and its password not shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SECRET_URL = "http://ada:secret@host/a"


@pytest.mark.parametrize(
    "words",
    [
        ["train", SECRET_URL],
        ["plan", SECRET_URL],
        ["data", "simulate", SECRET_URL],
        ["data", "tokenizer", "--input", SECRET_URL, "--vocab-size", "280", "--output", "t.json"],
        ["data", "tokenizer", "--input", "a.txt", "--vocab-size", "280", "--output", SECRET_URL],
        ["data", "prepare", "--input", "a.txt", "--tokenizer", "t.json", "--output", SECRET_URL],
        ["data", "prepare", "--input", "a.txt", "--tokenizer", SECRET_URL, "--output", "shards"],
        ["data", "verify", "shards", "--cache-dir", SECRET_URL],
        ["data", "preview", "shards", "--cache-dir", SECRET_URL],
        ["quickstart", "--folder", SECRET_URL],
    ],
    ids=" ".join,
)
def test_a_url_where_only_a_local_path_can_be_is_refused_and_makes_nothing(
    words: list[str], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(*words)
    assert "http://***@host/a" in line and "must be a local path, not a URL; name a" in line
    assert list(tmp_path.iterdir()) == []
