"""SIGKILL at 80 random moments: the same command goes on, to the bytes of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import read_index
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from tests.support.paths import ROOT
from tests.support.prepare_process import Disturbance, prepare_command
from tests.support.tiny_shards import TEXTS, write_jsonl

NUM_KILLS = 80
STAGES = {"digests", "duplicates", "shards", "the decision", "moves", "clearing"}

# The moments are calls that change what is on the disk, each before or after it was made. Between
# two of them a kill leaves what a kill at one of them leaves, or half a file: who is killed before
# it could sync a file leaves half of it.
SETTINGS = {"data_pipeline.prepare.deduplicate.RANGE_TEXTS": 9}


@dataclass
class Tally:
    """What the children came to."""

    killed: Counter[str] = field(default_factory=Counter)
    """By the stage at which they were."""
    finished: int = 0


def run(options: PrepareOptions, kill_at: int, made: bool) -> tuple[int, Any]:
    """Runs it till its end, or till the call at which it is killed (0: none); what it printed."""
    command = prepare_command(options, Disturbance(SETTINGS, kill_at=(kill_at, made)))
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": "."}
    )
    assert child.returncode in (0, -signal.SIGKILL), child.stderr
    return child.returncode, json.loads(child.stdout.split("\n")[0])


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by their path in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def disturb(
    options: PrepareOptions,
    expected: dict[str, bytes],
    draw: random.Random,
    kills: int,
    tally: Tally,
) -> None:
    """Kills the command so often, and lets it end, from an empty or an earlier folder each time."""
    earlier = files(options.output)
    code, num_calls = run(options, 0, False)
    assert code == 0 and files(options.output) == expected
    killed = 0
    while killed < kills:
        shutil.rmtree(options.output)
        for name, contents in earlier.items():
            options.output.mkdir(exist_ok=True)
            (options.output / name).write_bytes(contents)
        code = -1
        while code:
            # few calls are left to a run that goes on: a kill far ahead would let it end
            last = draw.choice([num_calls, 40, 15]) if killed < kills else 0
            code, where = run(options, draw.randint(min(last, 1), last), draw.random() < 0.5)
            if code:
                killed += 1
                tally.killed[where] += 1
                check_index(options.output, earlier, expected)
        assert files(options.output) == expected
        tally.finished += 1


def check_index(folder: Path, *states: dict[str, bytes]) -> None:
    """A folder with an index is whole: it is the earlier one or the new one."""
    if (folder / "index.json").exists():
        assert not list(verify_folder(read_index(folder)))
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert found in states


@pytest.fixture
def victims(tokenizer_file: Path, tmp_path: Path) -> list[tuple[PrepareOptions, int]]:
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
        options = PrepareOptions((texts,), tokenizer_file, output, **{**few, **chosen})
        pairs.append((options, kills))
    return pairs


@pytest.mark.slow(40)
def test_kills_change_no_byte(victims: list[tuple[PrepareOptions, int]], tmp_path: Path) -> None:
    """In every stage of the work, among them those between the earlier shards and the new ones."""
    draw, tally = random.Random(20261125), Tally()
    for number, (options, kills) in enumerate(victims):
        undisturbed = tmp_path / f"undisturbed-{number}"
        prepared = prepare(replace(options, output=undisturbed, workers=1, overwrite=False))
        assert prepared.num_parts == 4 and len(prepared.index.shards) > 6
        disturb(options, files(undisturbed), draw, kills, tally)
    assert sum(tally.killed.values()) >= NUM_KILLS
    assert set(tally.killed) >= STAGES, tally
    assert tally.finished >= len(victims)
