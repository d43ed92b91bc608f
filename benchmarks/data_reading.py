"""Speed of reading shards on one core, as ratios within one run, from a warm page cache.

    python -m benchmarks.data_reading [--shards FOLDER] [--rounds N]

Without --shards it writes 30M tokens in documents of realistic lengths to a temporary folder. In a
round every way reads as many tokens as the folder has, so that all of them meet documents of every
length. Ours is compared with stock webdataset over the same tars, with the bare reads that it makes
itself, with Megatron's memory-mapped tokens and, where it is installed, with mosaicml-streaming.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import (
    Work,
    compared,
    described,
    interleaved,
    machine,
    table,
    use_cores,
)
from benchmarks.reading_ways import (
    MICRO_BATCH_TOKENS,
    MappedTokens,
    bare_reads,
    endless,
    has_mosaic,
    mosaic_windows,
    packed_windows,
    reads_of,
    step_loader,
    stock_documents,
    stock_windows,
    tar_paths,
    whole_samples,
    whole_tars,
)
from benchmarks.synthetic_corpus import write_corpus
from data_pipeline.shard_format.index import ShardIndex, read_index

SEQ_LENS = (2048, 8192)
OURS = "windows, packed"
STOCK = "webdataset, documents"
BARE = "the same reads, bare"
WAYS = {
    OURS: "`SampleReader.window` and `pack_windows`: what each thread of the loader does",
    "StepLoader": "the whole loader with its threads on the one core",
    "samples with ids": "`SampleReader.sample`: reads the metadata of every document besides",
    STOCK: "`webdataset.WebDataset(tars).decode()`, every document, unpacked, in tar order",
    "webdataset, windows": "the same, joined and cut into int64 windows",
    BARE: "`os.pread` of the byte ranges that ours reads, in its order, and nothing else",
    "the same reads, as int64": "the same and their tokens as int64, unjoined and unchecked",
    "whole tars": "the tars from front to back in blocks of 1 MiB, nothing else",
    "memory-mapped": "one flat file, shuffled as Megatron does, int64 inputs and labels; unchecked",
    "mosaic streaming": "iterating a `StreamingDataset` of packed windows, int64 inputs; unchecked",
    "mosaic, by number": "`StreamingDataset[number]` of the same, without its order and threads",
}
GOALS = ((STOCK, 3.0), (BARE, 0.5))


def ways_of(index: ShardIndex, folder: Path, seq_len: int, tokens: int) -> dict[str, Work]:
    """Returns every way to read the folder that is installed.

    Args:
        index: of the shard folder.
        folder: where other formats of the same tokens are written.
        seq_len: tokens of a window.
        tokens: of one piece of work.
    """
    where = index.location
    num_samples = -(-index.num_stream_tokens // seq_len)
    reads = reads_of(where, seq_len, num_samples)
    ways = {
        OURS: packed_windows(where, seq_len, tokens),
        "StepLoader": step_loader(where, seq_len, tokens),
        "samples with ids": whole_samples(where, seq_len, tokens),
        STOCK: endless(lambda: stock_documents(index), tokens),
        "webdataset, windows": endless(lambda: stock_windows(index, seq_len), tokens),
        BARE: bare_reads(reads, index.num_stream_tokens, tokens, widen=False),
        "the same reads, as int64": bare_reads(reads, index.num_stream_tokens, tokens, widen=True),
        "whole tars": whole_tars(index, tokens),
        "memory-mapped": MappedTokens(index, folder, seq_len).work(tokens),
    }
    if has_mosaic():
        ways |= mosaic_windows(index, folder, seq_len, tokens)
    return ways


def measure(index: ShardIndex, seq_len: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Returns the speeds of all ways and the ratios of ours to the others."""
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(index, Path(folder), seq_len, tokens)
        for path in tar_paths(index):
            Path(path).read_bytes()  # the page cache is warm from here on
        timings = interleaved(ways, rounds)
    rows = {
        name: compared(timings[name], timings[OURS], turned=True)
        if name in timings
        else "not installed"
        for name in WAYS
    }
    return {"seq_len": seq_len, "ways": rows}


def report(result: Mapping[str, Any]) -> str:
    """Returns the result as markdown."""
    corpus = result["corpus"]
    lines = [
        "# Reading",
        "",
        described(result["machine"]),
        f"{corpus['name']}: {corpus['num_tokens']:,} tokens in {corpus['num_documents']:,} "
        f"documents and {corpus['num_shards']} shards, in the page cache.",
        f"{result['rounds']} rounds, in each of which every way reads as many tokens; medians, and "
        "the range over the rounds in brackets.",
        "Time by the wall, and of the processor: they differ where a way waits, or where others "
        "used the core.",
        f"Micro-batches of {MICRO_BATCH_TOKENS:,} tokens. Aims: "
        + ", ".join(f"at least {goal:g} x {name}" for name, goal in GOALS)
        + ".",
    ]
    for measured in result["measured"]:
        lines += ["", f"## Windows of {measured['seq_len']} tokens", ""]
        lines += table(measured["ways"], "ours / it")
    lines += ["", "## The ways", ""]
    lines += [f"- {name}: {what}." for name, what in WAYS.items()]
    return "\n".join(lines) + "\n"


def run(index: ShardIndex, name: str, rounds: int) -> dict[str, Any]:
    """Measures windows of every length."""
    tokens = index.num_stream_tokens
    return {
        "machine": machine("webdataset", "mosaicml-streaming"),
        "corpus": {
            "name": name,
            "num_shards": len(index.shards),
            "num_documents": index.num_documents,
            "num_tokens": index.num_tokens,
        },
        "rounds": rounds,
        "measured": [measure(index, seq_len, tokens, rounds) for seq_len in SEQ_LENS],
    }


def main() -> None:
    """Measures, prints the table and keeps it beside the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, help="shard folder; without it one is made up")
    parser.add_argument("--name", default="Shards", help="what the report calls the corpus")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data_reading.json"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset and mosaicml-streaming warn about themselves
    use_cores(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shards is None:
            index, name = write_corpus(Path(folder) / "web", 3, 10_000_000), "Made up"
        else:
            index, name = read_index(arguments.shards), arguments.name
        result = run(index, name, arguments.rounds)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
