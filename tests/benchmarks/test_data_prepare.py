"""What the prepare benchmark compares encodes the same texts."""

from __future__ import annotations

import gzip
import json
from contextlib import closing
from pathlib import Path

from benchmarks.data_prepare import (
    PROCESSES,
    THREADS,
    BareLoop,
    batches_of,
    compare,
    copy_repeatedly,
    read_texts,
    time_prepare,
)
from benchmarks.measuring import Timing
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [f"line {number}\nand its second \u2028 line" for number in range(30)]


def test_both_bare_variants_and_the_command_count_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "en_lines.jsonl.gz"
    records = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    path.write_bytes(gzip.compress(records.encode()))
    assert read_texts([path]) == TEXTS
    tokenizer_file = tmp_path / "tokenizer.json"
    tokenizer_file.write_bytes(train_tokenizer(TEXTS, 300))
    tokenizer = load_tokenizer(tokenizer_file)
    expected = 2 * sum(len(tokenizer.encode(text)) for text in TEXTS)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    copy_repeatedly([path], 2, inputs)
    with closing(BareLoop(tokenizer, TEXTS, repeat=2)) as bare:
        assert bare.threads().tokens == bare.processes().tokens == expected
    prepared = time_prepare(inputs, tokenizer_file, workers=1)
    assert prepared.tokens == expected and prepared.cpu_seconds > 0


def test_batches_keep_every_text_in_its_place() -> None:
    texts = ["a" * 400_000, "b" * 700_000, "c", "d" * 2_000_000, "e"]
    batches = batches_of(texts)
    assert [text for batch in batches for text in batch] == texts and len(batches) == 3


def test_the_faster_bare_variant_is_what_counts() -> None:
    timings = {
        THREADS: [Timing(100, 2.0, 4.0)],
        PROCESSES: [Timing(100, 1.0, 2.0)],
        "prepare --workers 2": [Timing(100, 1.25, 2.5)],
    }
    ratios = {name: row["ratio_by_wall"]["median"] for name, row in compare(timings).items()}
    assert ratios == {THREADS: 0.5, PROCESSES: 1.0, "prepare --workers 2": 0.8}
