"""Kills runs and bare saves at random moments, and looks at what is left.

    python -m benchmarks.checkpoint_kills --starts 200 --saves 1000 --folder runs/kills

`--starts`: runs of four processes that save beside the training; SIGKILL of one rank or of all at
a random moment, or when a folder of a save, a removal or a first row appears. The next start has
to go on from a checkpoint at least as new as any that was ever seen; where a run ends, its rows
and the fingerprints of its last checkpoint have to be those of a run that was left alone.
`--saves`: the file protocol alone, by one process without torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.measuring import machine
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.tokenizer import train_tokenizer
from megadlcm.checkpoint.folder import Checkpoint, candidates, open_checkpoint
from megadlcm.checkpoint.format import INDEX, Manifest, rank_file_header, write_blocks
from megadlcm.checkpoint.index import Index, Range
from megadlcm.checkpoint.storage import LocalStorage
from megadlcm.checkpoint.verifying import find_damage
from megadlcm.run_folder import files
from megadlcm.run_folder.rows import MEASURED_KEYS, read_rows

_RANKS = 4
_STEPS = 30
_PATIENCE = 180.0
_WAYS = ("any time", "any time", "writing", "writing", "deleting", "first row")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=200, help="kills of runs of four processes")
    parser.add_argument("--saves", type=int, default=1000, help="kills of bare saves")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    draw = random.Random(arguments.seed)
    results: dict[str, Any] = {"machine": machine()}
    if arguments.saves:
        results["saves"] = kill_saves(arguments.folder / "saves", arguments.saves, draw)
    if arguments.starts:
        results["starts"] = kill_starts(arguments.folder / "runs", arguments.starts, draw)
    path = arguments.results / "checkpoint_kills.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


# -- bare saves -----------------------------------------------------------------------------------


def kill_saves(root: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Kills a process that saves again and again; what the folder looks like each time.

    Raises:
        AssertionError: a checkpoint was lost, or one was there that is not whole.
    """
    left: Counter[str] = Counter()
    newest = 0
    for trial in range(count):
        process = multiprocessing.get_context("fork").Process(
            target=_save_for_ever, args=(root, newest, f"{trial:032x}")
        )
        process.start()
        time.sleep(draw.uniform(0.0, 0.15))
        seen = _newest_step(root)
        process.kill()
        process.join()
        left[_what_is_left(root)] += 1
        newest = _check(root, max(seen, newest))
    return {"kills": count, "failures": 0, "steps": newest, "left behind": dict(left)}


def _save_for_ever(root: Path, step: int, attempt: str) -> None:
    storage = LocalStorage(root)
    storage.tidy()
    while True:
        step += 1
        _save_bare(storage, step, attempt)
        for name in storage.names()[3:]:
            storage.remove(name, attempt)


def _save_bare(storage: LocalStorage, step: int, attempt: str) -> None:
    """A checkpoint of one tensor, all elements of which are the step."""
    name, size = files.step_name(step), 3000
    storage.begin(name, attempt, 4 * size)
    values = np.full(size, step, np.float32)
    index = Index.of({"w": (size,)}, 1, [[Range.whole("w", (size,))]])
    contents: dict[str, list[Any]] = {
        "rank_00000.safetensors": [rank_file_header({"master": size}), values.data.cast("B")],
        INDEX: [index.encode()],
        files.STATE: [json.dumps({"train_state": {"step": step}}).encode()],
    }
    entries = {}
    for file, parts in contents.items():
        new = storage.create(name, attempt, file)
        entries[file] = write_blocks(new, parts)
        new.finish()
    manifest = Manifest(
        step, "bare", attempt, "", {}, [], size, ["rank_00000.safetensors"], entries
    )
    storage.publish(name, attempt, manifest.encode())


# -- runs -----------------------------------------------------------------------------------------


def kill_starts(root: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Kills runs of four processes until so many starts were killed.

    Raises:
        AssertionError: something was lost, or a joined run differs from one that was left alone.
    """
    corpus = _make_corpus(root / "corpus")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.warm"])
    alone = Run(context, root / "alone", corpus)
    assert alone.start().wait() == [0] * _RANKS, "the run that is left alone failed"
    how: Counter[str] = Counter()
    left: Counter[str] = Counter()
    kills = lives = 0
    while kills < count:
        run = Run(context, root / f"run{lives}", corpus)
        while kills < count:
            newest = run.newest()
            way = draw.choice(_WAYS)
            started = run.start()
            victims = [draw.randrange(_RANKS)] if draw.random() < 0.5 else list(range(_RANKS))
            if not started.kill(way, victims, draw):
                break  # it came to its end
            kills += 1
            how[f"{way}, {'one rank' if len(victims) == 1 else 'all'}"] += 1
            left[_what_is_left(run.checkpoints)] += 1
            _check(run.checkpoints, newest)
            print(f"{kills}/{count}: {way}, newest step {run.newest()}", flush=True)
        else:
            run.start().wait()
        assert run.start().wait() == [0] * _RANKS, f"{run.folder} does not end"
        run.compare(alone)
        shutil.rmtree(run.folder)
        lives += 1
    return {
        "kills": kills,
        "failures": 0,
        "runs that were joined and equal": lives,
        "how": dict(how),
        "left behind": dict(left),
    }


class Run:
    """A run of four processes, of which each start is a set of them."""

    def __init__(self, context: Any, folder: Path, corpus: Path) -> None:
        self.context, self.folder = context, folder
        self.checkpoints = folder / files.CHECKPOINTS
        self.file = folder.with_suffix(".yaml")
        self.file.write_text(yaml.safe_dump(_values(folder, corpus)))
        self.starts = 0

    def start(self) -> Start:
        """Starts all processes."""
        self.starts += 1
        port = 29_000 + (os.getpid() + self.starts) % 900
        processes = []
        for rank in range(_RANKS):
            log = self.folder.with_name(f"{self.folder.name}.rank{rank}.log")
            process = self.context.Process(target=_train, args=(self.file, rank, port, log))
            process.start()
            processes.append(process)
        return Start(self, processes)

    def newest(self) -> int:
        """Step of the newest checkpoint that has its name."""
        return _newest_step(self.checkpoints)

    def compare(self, other: Run) -> None:
        """Raises AssertionError where the two differ."""
        own, expected = (_rows(run.folder) for run in (self, other))
        assert own == expected, f"rows of {self.folder} differ from those of an undisturbed run"
        prints = [
            open_checkpoint(storage, storage.names()[0]).manifest.fingerprints
            for storage in (LocalStorage(self.checkpoints), LocalStorage(other.checkpoints))
        ]
        assert prints[0] == prints[1] and prints[0], "the last checkpoints differ"


class Start:
    """The processes of one start."""

    def __init__(self, run: Run, processes: list[BaseProcess]) -> None:
        self.run, self.processes = run, processes

    def wait(self) -> list[int | None]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + _PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"a start of {self.run.folder} hangs"
        return [process.exitcode for process in self.processes]

    def kill(self, way: str, victims: list[int], draw: random.Random) -> bool:
        """Kills some ranks at some moment, and waits for the rest; False if it ended before."""
        rows = len(_lines(self.run.folder / files.METRICS))
        moments: dict[str, Callable[[], bool]] = {
            "any time": lambda: True,
            "writing": lambda: _has(self.run.checkpoints, ".writing"),
            "deleting": lambda: _has(self.run.checkpoints, ".deleting"),
            "first row": lambda: len(_lines(self.run.folder / files.METRICS)) > rows,
        }
        if not self._wait_until(moments[way]):
            return False
        time.sleep(draw.uniform(0.0, 6.0 if way == "any time" else 0.08))
        if all(process.exitcode is not None for process in self.processes):
            return False
        for rank in victims:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].exitcode is None:
                os.kill(pid, signal.SIGKILL)
        self.wait()
        return True

    def _wait_until(self, moment: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while not moment():
            if all(process.exitcode is not None for process in self.processes):
                return False
            assert time.monotonic() < deadline, f"a start of {self.run.folder} hangs"
            time.sleep(0.001)
        return True


def _train(file: Path, rank: int, port: int, log: Path) -> None:
    """A rank of a start."""
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    import torch

    from megadlcm.commands.main import main as command

    torch.set_num_threads(1)
    code = command(["train", str(file)])
    os._exit(code)


def _values(folder: Path, corpus: Path) -> dict[str, Any]:
    return {
        "name": "killed",
        "output_dir": str(folder),
        "model": {
            "architecture": "dlcm", "vocab_size": 300, "d_token": 16, "d_concept": 32,
            "encoder_layers": 1, "backbone_layers": 1, "decoder_layers": 1, "token_heads": 2,
            "token_kv_heads": 2, "concept_heads": 2, "concept_kv_heads": 2, "token_ffn_size": 32,
            "concept_ffn_size": 48,
        },
        "data": {"train": [{"path": str(corpus / "train"), "name": "train"}], "seq_len": 32},
        "parallel": {
            "zero_stage": 1, "tensor_parallel_size": 2, "collective_timeout_seconds": 10.0,
        },
        "training": {"train_steps": _STEPS, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 2},
        "mup": {"base_width": 16},
        "checkpoint": {"interval_steps": 2, "keep": 2, "async": True},
        "evaluation": {"interval_steps": 0},
        "logging": {"peak_tflops": 0.1},
    }  # fmt: skip


def _make_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "two",
        "small",
        "birds",
        "in",
        "an",
        "old",
        "green",
        "tree",
    ]
    texts = [" ".join(draw.choices(words, k=30 + number % 40)) for number in range(80)]
    (folder / "tokenizer.json").write_bytes(train_tokenizer(texts, 300))
    lines = [json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("".join(lines))
    prepare(
        PrepareOptions((str(folder / "train.jsonl"),), folder / "tokenizer.json", folder / "train")
    )
    return folder


# -- what is looked at ----------------------------------------------------------------------------


def _check(root: Path, expected: int) -> int:
    """The newest checkpoint, all of which is read; at least as new as one that was seen.

    Every folder with a checkpoint's name has to be whole.
    """
    newest = 0
    for name, found in candidates(LocalStorage(root)):
        assert isinstance(found, Checkpoint), f"{name} is damaged after a kill: {found}"
        problems = list(find_damage(found, threads=1))
        assert not problems, f"{name} is damaged after a kill: {problems[0]}"
        newest = max(newest, found.step)
    assert newest >= expected, f"step {expected} was there before the kill, now {newest}"
    return newest


def _newest_step(root: Path) -> int:
    names = LocalStorage(root).names()
    return int(names[0].rpartition("_")[2]) if names else 0


def _what_is_left(root: Path) -> str:
    """Which states of a save or of a removal a kill has left."""
    if not root.is_dir():
        return "nothing"
    kinds = set()
    for path in root.iterdir():
        if path.name.endswith(".writing"):
            content = {file.name for file in path.iterdir()}
            whole = files.MANIFEST in content
            kinds.add("manifest" if whole else "files" if content else "empty folder")
        elif path.name.endswith(".deleting"):
            kinds.add("removal")
    return " + ".join(sorted(kinds)) or "nothing"


def _has(root: Path, ending: str) -> bool:
    try:
        return any(entry.name.endswith(ending) for entry in os.scandir(root))
    except FileNotFoundError:
        return False


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def _rows(folder: Path) -> list[dict[str, Any]]:
    hidden = {*MEASURED_KEYS, "restart_count"}
    return [
        {key: value for key, value in row.items() if key not in hidden} for row in read_rows(folder)
    ]


if __name__ == "__main__":
    main()
