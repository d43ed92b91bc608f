"""One trillion tokens: an index of 100,000 shards, opened and sought in a fresh process.

    python -m benchmarks.trillion_tokens [--output JSON]

The shards exist nowhere: their index is written, and the tokens of their documents are made by a
function of the shard's number when they are asked for. The order is checked by sampling, against
definitions of its own (benchmarks/order_checks.py).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

START = time.perf_counter()  # before numpy: its import is part of opening

from benchmarks.order_checks import Corpus, check_all  # noqa: E402
from benchmarks.synthetic_corpus import (  # noqa: E402
    MEAN_TOKENS,
    document_lengths,
    enormous_index,
    write_index,
)
from data_pipeline.config import SourceConfig  # noqa: E402
from data_pipeline.quotas import source_quotas  # noqa: E402
from data_pipeline.reading.mixture import Mixture  # noqa: E402
from data_pipeline.reading.order import SourceOrder  # noqa: E402
from data_pipeline.shard_format.index import read_index  # noqa: E402

SEQ_LEN, SHUFFLE_BLOCK, SEED = 2048, 16384, 7
NUM_SHARDS, SHARD_TOKENS = 100_000, 10_000_000
MIX = {"en": 0.50, "zh": 0.25, "code": 0.15, "math": 0.10}
SEEKS = 100
EPOCHS = 4
GOALS = {"seconds": 1.0, "mebibytes": 300.0}


class Source(NamedTuple):
    """A folder and its order."""

    name: str
    corpus: Corpus
    order: SourceOrder


def write_folders(folder: Path, num_shards: int = NUM_SHARDS) -> dict[str, int]:
    """Writes the index of one folder of everything and of one per domain.

    Returns:
        Bytes of each index by the folder's name.
    """
    sizes = {"all": num_shards}
    sizes |= {name: round(weight * num_shards) for name, weight in MIX.items()}
    return {
        name: write_index(folder / name, enormous_index(folder / name, size, SHARD_TOKENS, name))
        for name, size in sizes.items()
    }


def open_sources(folder: Path, names: Sequence[str]) -> list[Source]:
    """Reads the indexes of folders of write_folders."""
    sources = []
    for key, name in enumerate(names):
        shards = read_index(folder / name).shards

        def stream_tokens(shard: int, rows: Any = shards.rows) -> Any:
            row = rows[shard]
            return document_lengths(shard, int(row["num_documents"]), int(row["num_tokens"])) + 1

        sizes = shards.rows["num_tokens"] + shards.rows["num_documents"]
        corpus = Corpus(sizes, stream_tokens, SEQ_LEN, SEED, key, SHUFFLE_BLOCK)
        sources.append(Source(name, corpus, corpus.order()))
    return sources


def open_mixture(names: Sequence[str]) -> Mixture:
    """Returns the mixture of the folders by MIX, or of one folder alone."""
    configs = [SourceConfig(name, MIX.get(name, 1.0)) for name in names]
    return Mixture(source_quotas(configs, "train"), SEED)


def seek(sources: Sequence[Source], mixture: Mixture, sample: int) -> int:
    """Finds shards, documents and places of a sample and returns its tokens."""
    turn = mixture.turn(sample)
    order = sources[turn.source].order
    place = order.place(turn.number)
    return sum(
        stop - start
        for stretch in order.stretches(place)
        for _, start, stop in order.pieces(place.epoch, stretch)
    )


def peak_mebibytes() -> float:
    """Returns the most memory that this process has held, by the kernel's count."""
    # not getrusage: its maximum survives exec, so a child would report its parent's
    with open("/proc/self/status", encoding="utf-8") as lines:
        peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def open_and_seek(folder: Path, names: Sequence[str], seed: int) -> dict[str, float]:
    """What a fresh process does: opens folders and seeks random samples of several epochs.

    Returns:
        Seconds from the first import to the first sample, to the last of SEEKS, of the median and
        the slowest seek after the first, and the peak memory in MiB.
    """
    sources, mixture = open_sources(folder, names), open_mixture(names)
    opened = time.perf_counter() - START
    total = sum(source.order.num_windows for source in sources)
    random_samples = random.Random(seed)
    seconds = []
    for _ in range(SEEKS):
        begun = time.perf_counter()
        tokens = seek(sources, mixture, random_samples.randrange(EPOCHS * total))
        seconds.append(time.perf_counter() - begun)
        assert 0 < tokens <= SEQ_LEN, tokens
    later = sorted(seconds[1:])
    return {
        "opened_seconds": opened,
        "first_sample_seconds": opened + seconds[0],
        "all_samples_seconds": opened + sum(seconds),
        "median_seek_seconds": later[len(later) // 2],
        "slowest_seek_seconds": later[-1],
        "peak_mebibytes": peak_mebibytes(),
    }


def in_fresh_process(folder: Path, names: Sequence[str], seed: int) -> dict[str, float]:
    """Returns open_and_seek of a new process, and the seconds of that process as a whole."""
    command = [sys.executable, "-m", "benchmarks.trillion_tokens"]
    command += ["--seed", str(seed), "--worker", str(folder), *names]
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found | {"process_seconds": time.perf_counter() - begun}


def measure(folder: Path, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Returns the worst of several fresh processes and what the checks looked at."""
    runs = [in_fresh_process(folder, names, seed) for seed in range(rounds)]
    sources = open_sources(folder, names)
    return {
        "folders": list(names),
        "worst": {key: max(run[key] for run in runs) for key in runs[0]},
        "stream_tokens": sum(source.order.num_stream_tokens for source in sources),
        "checked": check_all(
            [source.corpus for source in sources], open_mixture(names), SEEKS, EPOCHS
        ),
    }


def report(result: dict[str, Any]) -> str:
    """Returns the result as markdown."""
    from benchmarks.measuring import described

    lines = [
        "# One trillion tokens",
        "",
        described(result["machine"]),
        f"{NUM_SHARDS:,} shards of at most {SHARD_TOKENS:,} tokens in about "
        f"{SHARD_TOKENS // MEAN_TOKENS:,} documents, as one folder and as four, mixed "
        f"{', '.join(f'{weight:.0%} {name}' for name, weight in MIX.items())}.",
        f"The index of the one folder takes {result['index_bytes']['all']:,} bytes on disk.",
        "",
        f"The slowest and the largest of {result['rounds']} fresh processes each, counted from "
        "before the import of numpy.",
        f"Each finds {SEEKS} random samples of {EPOCHS} epochs down to the places of their "
        f"documents. Aims: the first within {GOALS['seconds']:g} s, at most "
        f"{GOALS['mebibytes']:g} MiB.",
        "",
        "| folders | stream tokens | opened | first sample | median seek | slowest seek "
        "| all samples | whole process | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for measured in result["measured"]:
        worst = measured["worst"]
        lines.append(
            f"| {', '.join(measured['folders'])} | {measured['stream_tokens']:,} "
            f"| {worst['opened_seconds']:.2f} s | {worst['first_sample_seconds']:.2f} s "
            f"| {worst['median_seek_seconds'] * 1e3:.1f} ms "
            f"| {worst['slowest_seek_seconds'] * 1e3:.1f} ms "
            f"| {worst['all_samples_seconds']:.2f} s | {worst['process_seconds']:.2f} s "
            f"| {worst['peak_mebibytes']:.0f} MiB |"
        )
    lines += ["", "Checked by sampling, without an exception:", ""]
    for measured in result["measured"]:
        counts = ", ".join(f"{count:,} {what}" for what, count in measured["checked"].items())
        lines.append(f"- {', '.join(measured['folders'])}: {counts}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the indexes, measures, checks, and keeps the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/trillion_tokens.json")
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        folder, *names = arguments.worker
        print(json.dumps(open_and_seek(Path(folder), names, arguments.seed)))
        return
    from benchmarks.measuring import machine

    with tempfile.TemporaryDirectory() as written:
        index_bytes = write_folders(Path(written))
        groups: list[list[str]] = [["all"], list(MIX)]
        result = {
            "machine": machine(),
            "rounds": arguments.rounds,
            "index_bytes": index_bytes,
            "measured": [measure(Path(written), names, arguments.rounds) for names in groups],
        }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
