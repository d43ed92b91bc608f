"""Tables of a shard folder, and the list of its tar files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline import read_index
from data_pipeline.commands.data import add_data_parser
from data_pipeline.config import SourceConfig
from data_pipeline.inspection.describe import describe, domain_table, shard_table, shard_urls
from data_pipeline.shard_format.index import DomainCounts
from data_pipeline.storage.open import open_storage

MakeNumbered = Callable[..., SourceConfig]


def test_shares_are_those_of_the_tokens() -> None:
    """And the last row sums up."""
    domains = {"zh": DomainCounts(2, 75, 150), "en": DomainCounts(1, 25, 100)}
    header, english, chinese, total = (line.split() for line in domain_table(domains).splitlines())
    assert header == ["domain", "documents", "tokens", "bytes", "bytes/token", "share"]
    assert english == ["en", "1", "25", "100", "4.00", "25.0%"]
    assert chinese == ["zh", "2", "75", "150", "2.00", "75.0%"]
    assert total == ["all", "3", "100", "250", "2.50", "100.0%"]


def test_a_folder_is_described_by_its_index_alone(make_numbered: MakeNumbered) -> None:
    """Also where no shard is left."""
    folder = Path(make_numbered([30, 5, 1, 20]).path)
    index = read_index(folder)
    for path in (*folder.glob("shard-*"), folder / "tokenizer.json"):
        path.unlink()
    again = read_index(folder)
    text = describe(again)
    assert text == describe(index)
    for part in (
        str(folder),
        f"{len(index.shards)} of ",
        "56 ",
        "60 tokens an epoch",
        index.fingerprint,
        index.tokenizer_sha256,
        "uint16",
    ):
        assert part in text
    _, *rows = (line.split() for line in shard_table(again).splitlines())
    assert [row[0] for row in rows] == [shard.name for shard in index.shards]
    assert len(rows) > 1
    assert sum(int(row[1]) for row in rows) == 4 and sum(int(row[2]) for row in rows) == 56


def test_urls_are_where_the_shards_lie(make_numbered: MakeNumbered) -> None:
    """On a path and behind a URL; what is listed can be opened."""
    folder = make_numbered([30, 5, 1, 20]).path
    index = read_index(folder)
    paths = list(shard_urls(index, open_storage(folder)))
    assert len(paths) == len(index.shards) and all(Path(path).is_file() for path in paths)
    urls = list(shard_urls(index, open_storage("memory://bucket/mix")))
    assert urls[0] == "memory://bucket/mix/shard-000000.tar"


def test_numbers_of_numpy_have_their_columns(make_numbered: MakeNumbered) -> None:
    """Counts beyond 32 bits, as those of a large folder are."""
    index = read_index(make_numbered([3, 4]).path)
    rows = index.shards.rows.copy()
    rows["tar_bytes"] = np.int64(10**13)
    index.shards.rows = rows
    assert "10,000,000,000,000" in describe(index)


def test_the_parser_hands_on_its_commands() -> None:
    """Others add theirs behind `data`."""
    commands = add_data_parser(argparse.ArgumentParser().add_subparsers())
    assert {"inspect", "verify", "prepare", "tokenizer"} <= set(commands.choices)
