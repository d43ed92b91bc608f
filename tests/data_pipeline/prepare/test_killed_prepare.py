"""SIGKILL at 80 random moments: the same command goes on, to the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import read_index
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from tests.support.paths import ROOT
from tests.support.tiny_shards import TEXTS, write_jsonl

NUM_KILLS = 80
STAGES = {"digests", "duplicates", "shards", "the decision", "moves", "clearing"}

# The moments are calls that change what is on the disk, each before or after it was made. Between
# two of them a kill leaves what a kill at one of them leaves, or half a file: who is killed before
# it could sync a file leaves half of it.
CHILD = """
import os, signal, stat, sys
from pathlib import Path
from data_pipeline.prepare import deduplicate
from data_pipeline.prepare.write_shards import PrepareOptions, prepare

deduplicate.RANGE_TEXTS = 9
output = sys.argv[3]
kill_at, made, calls = int(sys.argv[4]), sys.argv[5] == "made", 0

def stage(name, first):
    path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
    if name in ("unlink", "rmdir") and "/.unfinished" in path:
        return "clearing"
    for part, what in {"digests": "digests", "/duplicates": "duplicates", "/ready": "the decision",
                       "/parts": "shards"}.items():
        if part in path and not (name == "replace" and "/shard-" in path):
            return what
    return "moves" if name == "replace" or "/shard-" in path else "the rest"

def counted(name):
    sound = getattr(os, name)
    def call(*given, **named):
        global calls
        calls += 1
        if calls == kill_at:
            where = stage(name, given[0])
            if name == "replace" and "/shard-" in str(given[1]):
                where = "moves"
            print(where, flush=True)
            if made:
                sound(*given, **named)
            elif name == "fsync" and stat.S_ISREG(os.fstat(given[0]).st_mode):
                os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return sound(*given, **named)
    setattr(os, name, call)

if __name__ == "__main__":
    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        counted(name)
    prepare(PrepareOptions((sys.argv[1],), Path(sys.argv[2]), Path(output), **eval(sys.argv[6])))
    print(calls)
"""


@dataclass
class Tally:
    """What the children came to."""

    killed: Counter[str] = field(default_factory=Counter)
    """By the stage at which they were."""
    finished: int = 0


@dataclass
class Victim:
    """A command that is started again and again."""

    texts: str
    tokenizer: Path
    output: Path
    chosen: dict[str, Any]

    def start(self, kill_at: int, made: bool) -> tuple[int, str]:
        """Runs it till its end, or till the call at which it is killed (0: none)."""
        script = self.output.with_name("child.py")
        script.write_text(CHILD)
        words = [self.texts, self.tokenizer, self.output, kill_at, "made" if made else "not"]
        command = [sys.executable, str(script), *map(str, words), repr(self.chosen)]
        root = ROOT
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=root, env={"PYTHONPATH": "."}
        )
        assert child.returncode in (0, -signal.SIGKILL), child.stderr
        return child.returncode, child.stdout.split("\n")[0]


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by their path in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def disturb(
    victim: Victim, expected: dict[str, bytes], draw: random.Random, kills: int, tally: Tally
) -> None:
    """Kills the command so often, and lets it end, from an empty or an earlier folder each time."""
    earlier = files(victim.output)
    code, num_calls = victim.start(0, False)
    assert code == 0 and files(victim.output) == expected
    killed = 0
    while killed < kills:
        shutil.rmtree(victim.output)
        for name, contents in earlier.items():
            victim.output.mkdir(exist_ok=True)
            (victim.output / name).write_bytes(contents)
        code = -1
        while code:
            # few calls are left to a run that goes on: a kill far ahead would let it end
            last = draw.choice([int(num_calls), 40, 15]) if killed < kills else 0
            code, where = victim.start(draw.randint(min(last, 1), last), draw.random() < 0.5)
            if code:
                killed += 1
                tally.killed[where] += 1
                check_index(victim.output, earlier, expected)
        assert files(victim.output) == expected
        tally.finished += 1


def check_index(folder: Path, *states: dict[str, bytes]) -> None:
    """A folder with an index is whole: it is the earlier one or the new one."""
    if (folder / "index.json").exists():
        assert not list(verify_folder(read_index(folder)))
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert found in states


@pytest.fixture
def victims(tokenizer_file: Path, tmp_path: Path) -> list[tuple[Victim, int]]:
    """Commands and how often each is to be killed; together NUM_KILLS."""
    (tmp_path / "texts").mkdir()
    for number in range(4):
        own = [f"{(at + number) % 9} {text}" for at, text in enumerate(TEXTS * (1 + number))]
        write_jsonl(tmp_path / "texts" / f"{number}.jsonl", own)
    texts, few = str(tmp_path / "texts" / "*"), {"shard_tokens": 150, "part_bytes": 1}
    variants: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {}, 16),
        ({"deduplicate": True, "max_tokens": 70, "shard_tokens": 60}, {}, 44),
        ({"overwrite": True}, {"shard_tokens": 40}, 14),
        ({"workers": 2}, {}, 6),
    ]
    assert sum(kills for *_, kills in variants) == NUM_KILLS
    pairs = []
    for number, (chosen, earlier, kills) in enumerate(variants):
        output = tmp_path / f"shards-{number}"
        if earlier:
            prepare(PrepareOptions((texts,), tokenizer_file, output, **earlier))
        pairs.append((Victim(texts, tokenizer_file, output, {**few, **chosen}), kills))
    return pairs


@pytest.mark.slow
def test_kills_change_no_byte(victims: list[tuple[Victim, int]], tmp_path: Path) -> None:
    """In every stage of the work, among them those between the earlier shards and the new ones."""
    draw, tally = random.Random(20261125), Tally()
    for number, (victim, kills) in enumerate(victims):
        plain = {**victim.chosen, "workers": 1, "overwrite": False}
        undisturbed = tmp_path / f"undisturbed-{number}"
        options = PrepareOptions((victim.texts,), victim.tokenizer, undisturbed, **plain)
        prepared = prepare(options)
        assert prepared.num_parts == 4 and len(prepared.index.shards) > 6
        disturb(victim, files(undisturbed), draw, kills, tally)
    assert sum(tally.killed.values()) >= NUM_KILLS
    assert set(tally.killed) >= STAGES, tally
    assert tally.finished >= len(victims)
