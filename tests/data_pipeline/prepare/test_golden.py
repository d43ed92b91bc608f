"""Prepared bytes are those that earlier programs wrote: old corpora and new ones fit together.

The digests in tests/golden/prepared are theirs. A change of the format is a
new VERSION of the index, and new digests.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "prepared"
DIGESTS: dict[str, dict[str, str]] = json.loads((GOLDEN / "digests.json").read_text("utf-8"))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"shard_tokens": 400, "skip_empty": True},
    "chosen": {
        "shard_tokens": 200,
        "part_bytes": 100,
        "skip_empty": True,
        "deduplicate": True,
        "min_tokens": 4,
        "max_tokens": 1000,
        "domain": "mine",
        "workers": 2,
    },
}


def prepared_digests(texts: Path, output: Path, variant: str) -> dict[str, str]:
    """Prepares lines, a text and a source tree; returns the SHA-256 of each file that it writes."""
    inputs = tuple(str(texts / name) for name in ("*.jsonl", "b.txt", "tree"))
    prepare(PrepareOptions(inputs, GOLDEN / "tokenizer.json", output, **VARIANTS[variant]))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.iterdir())
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_prepared_bytes_are_those_written_before(variant: str, tmp_path: Path) -> None:
    expected = DIGESTS[variant]
    assert len(expected) >= 8
    assert prepared_digests(GOLDEN / "texts", tmp_path / "shards", variant) == expected


def test_another_letter_of_the_input_shows_in_the_shard_that_holds_it(tmp_path: Path) -> None:
    """And in the digest of the shards: the comparison sees what it is there to see."""
    shutil.copytree(GOLDEN / "texts", tmp_path / "texts")
    changed = tmp_path / "texts" / "tree" / "one.c"
    changed.write_text(changed.read_text().replace("return 1", "return 2"))
    found = prepared_digests(tmp_path / "texts", tmp_path / "shards", "plain")
    differ = {name for name, digest in DIGESTS["plain"].items() if found[name] != digest}
    last = max(name for name in found if name.endswith(".tar"))
    assert differ == {last, last.replace(".tar", ".documents.npy"), "shards.npy", "index.json"}
