"""Each format is found by the endings of its files, and loads nothing that others do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.prepare.formats.format import InputFile
from data_pipeline.prepare.formats.known import ENDINGS, FORMATS, TREE, format_named, format_of
from tests.support.paths import ROOT


def test_an_ending_belongs_to_one_format() -> None:
    for name in (f"a{ending}" for ending in ENDINGS):
        assert sum(name.endswith(each.endings) for each in FORMATS) == 1
        assert format_named(name) is next(each for each in FORMATS if name.endswith(each.endings))
    assert format_named("a.csv") is None


def test_a_file_of_a_tree_is_one_whatever_it_is_called() -> None:
    assert format_of(InputFile(Path("t/a.jsonl"), "t/a.jsonl", 1, tree="t")) is TREE
    assert format_of(InputFile(Path("t/a.jsonl"), "a.jsonl", 1)) is not TREE
    with pytest.raises(AssertionError, match="of no format"):
        format_of(InputFile(Path("a.csv"), "a.csv", 1))


def test_only_parquet_loads_pyarrow() -> None:
    program = (
        "import sys, data_pipeline.prepare.write_shards as w; "
        "sys.exit(any(name in sys.modules for name in ('pyarrow', 'zstandard')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
