"""Speed of `megadlcm data prepare` over the bare loop of the tokenizers library, on the same cores.

    python -m benchmarks.data_prepare --text TEXT --tokenizer FILE [--repeat N] [--rounds N]

`prepare` is timed as a command, from its start to its end: it starts its processes, decompresses,
parses, encodes, and writes shards, checksums and index. The bare loop encodes the same texts, in
memory already, and throws the tokens away; its processes run before its clock does. It has two
variants, threads of the library and processes of Python: the faster one counts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measuring import (
    Timing,
    compared,
    described,
    machine,
    spread,
    table,
    use_cores,
)
from data_pipeline.shard_format.index import read_index
from data_pipeline.tokenizer import Tokenizer, decode_tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 20
THREADS, PROCESSES = "bare, threads", "bare, processes"
GOAL = 0.85


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Returns the texts of .jsonl.gz files."""
    texts = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            texts += [json.loads(line)["text"] for line in lines if line.strip()]
    return texts


def batches_of(texts: Sequence[str]) -> list[list[str]]:
    """Returns the texts in batches of about BATCH_CHARACTERS."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The bare loop: encodes a batch and looks at nothing but how many tokens there are."""
    encoded = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return sum(map(len, encoded))


_given: tuple[Tokenizer, list[list[str]]]


def _start_worker(contents: bytes, batches: list[list[str]]) -> None:
    global _given
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _given = decode_tokenizer(contents, Path("tokenizer.json")), batches


def _count_in_worker(number: int) -> tuple[int, float]:
    tokenizer, batches = _given
    begun = time.process_time()
    return count_tokens(tokenizer, batches[number]), time.process_time() - begun


class BareLoop:
    """The tokenizers library on texts that are in memory, in both variants; close it when done."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], repeat: int) -> None:
        """Starts as many processes as there are cores and gives each of them all texts."""
        self._tokenizer, self._batches = tokenizer, batches_of(texts)
        self._numbers = [*range(len(self._batches))] * repeat
        spawn = multiprocessing.get_context("spawn")
        given = (tokenizer.contents, self._batches)
        cores = len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(cores, spawn, _start_worker, given)
        self.processes()  # all of them have the texts from here on

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown()

    def threads(self) -> Timing:
        """One process, the library's threads."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = sum(
            count_tokens(self._tokenizer, self._batches[number]) for number in self._numbers
        )
        return Timing(tokens, time.perf_counter() - wall, time.process_time() - cpu)

    def processes(self) -> Timing:
        """A process for each core, one thread in each."""
        wall = time.perf_counter()
        found = list(self._pool.map(_count_in_worker, self._numbers))
        seconds = time.perf_counter() - wall
        return Timing(sum(tokens for tokens, _ in found), seconds, sum(cpu for _, cpu in found))


def time_prepare(inputs: Path, tokenizer: Path, workers: int) -> Timing:
    """Runs the command once, as a user would, and removes what it wrote.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "shards"
        command = [sys.executable, "-m", "megadlcm", "data", "prepare"]
        command += [f"--input={inputs}/*.jsonl.gz", f"--tokenizer={tokenizer}"]
        command += [f"--output={output}", f"--workers={workers}"]
        # as in a fresh shell: the bare loop sets it for itself
        environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
        before, wall = os.times(), time.perf_counter()
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        seconds, after = time.perf_counter() - wall, os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])  # user and system time of ended children
        return Timing(read_index(output).num_tokens, seconds, cpu)


def copy_repeatedly(paths: Sequence[Path], repeat: int, folder: Path) -> None:
    """Copies every file `repeat` times into a folder: with more text, starting up weighs less."""
    for number in range(repeat):
        for path in paths:
            shutil.copyfile(path, folder / f"{number:03d}-{path.name}")


def measure(
    paths: Sequence[Path], tokenizer_path: Path, workers: Sequence[int], repeat: int, rounds: int
) -> dict[str, Any]:
    """Times the bare loop and `prepare` in turn.

    Args:
        paths: .jsonl.gz files.
        tokenizer_path: tokenizer file or folder.
        workers: values of --workers.
        repeat: how often the files are read.
        rounds: repetitions.

    Returns:
        Numbers for the report.

    Raises:
        AssertionError: they did not encode the same tokens.
    """
    texts = read_texts(paths)
    bare = BareLoop(load_tokenizer(tokenizer_path), texts, repeat)
    timings: dict[str, list[Timing]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy_repeatedly(paths, repeat, Path(folder))
        for _ in range(rounds):
            timings.setdefault(THREADS, []).append(bare.threads())
            timings.setdefault(PROCESSES, []).append(bare.processes())
            for count in workers:
                name = f"prepare --workers {count}"
                timing = time_prepare(Path(folder), tokenizer_path, count)
                timings.setdefault(name, []).append(timing)
    bare.close()
    counted = {timing.tokens for row in timings.values() for timing in row}
    assert len(counted) == 1, counted
    return {
        "machine": machine("tokenizers"),
        "num_documents": len(texts) * repeat,
        "num_bytes": sum(len(text.encode()) for text in texts) * repeat,
        "num_tokens": counted.pop(),
        "rounds": rounds,
        "ways": compare(timings),
    }


def compare(timings: Mapping[str, list[Timing]]) -> dict[str, Any]:
    """Returns the speed of each way and its ratio to the faster bare variant."""
    bare = min(
        (timings[name] for name in (THREADS, PROCESSES)),
        key=lambda row: spread([timing.wall_seconds for timing in row])["median"],
    )
    return {name: compared(row, bare, turned=False) for name, row in timings.items()}


def report(result: Mapping[str, Any]) -> str:
    """Returns the result as markdown."""
    lines = [
        "# Preparing",
        "",
        described(result["machine"]),
        f"{result['num_tokens']:,} tokens, {result['num_bytes']:,} bytes of text in "
        f"{result['num_documents']:,} documents, gzip. {result['rounds']} rounds; medians, and the "
        "range over the rounds in brackets.",
        "`prepare` is the whole command from its start to its end; the bare loop has its texts in "
        "memory and its processes running.",
        "Time by the wall, and of the processors: they differ where cores are idle, or where "
        "others used them.",
        f"Aim: at least {GOAL:g} of the faster bare variant.",
        "",
        *table(result["ways"], "over bare"),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the table and keeps it beside the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder with train/*.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer file or folder")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1 and all cores")
    parser.add_argument("--repeat", type=int, default=4, help="times every file is read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data_prepare.json"))
    arguments = parser.parse_args()
    use_cores(arguments.cores)
    paths = sorted((arguments.text / "train").glob("*.jsonl.gz"))
    workers = arguments.workers or sorted({1, arguments.cores})
    result = measure(paths, arguments.tokenizer, workers, arguments.repeat, arguments.rounds)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
