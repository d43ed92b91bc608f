"""Of equal texts the first stays, and what is left out is what plain counting leaves out."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import read_index
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.prepare import deduplicate
from data_pipeline.prepare.work_folder import WorkFolder
from data_pipeline.prepare.write_shards import Prepared, PrepareOptions, prepare
from data_pipeline.reading.shards import open_documents
from data_pipeline.storage.locks import FileLock
from data_pipeline.tokenizer import load_tokenizer
from tests.support.prepare_process import Disturbance, start_prepare
from tests.support.tiny_shards import TEXTS

NUM_FILES = 7
Reference = tuple[list[str], Counter[str]]


def write_corpus(folder: Path, seed: int) -> list[tuple[str, str]]:
    """Writes files with many repeats, some empty; returns id and text in reading order."""
    draw = random.Random(seed)
    pool = [f"{text[:20]} {number}" for number in range(6) for text in TEXTS] + ["", "rare " * 30]
    documents = []
    folder.mkdir()
    for file in range(NUM_FILES):
        own = [(f"{file}-{at}", draw.choice(pool)) for at in range(draw.choice([0, 5, 30]))]
        lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in own]
        (folder / f"{file}.jsonl").write_text("".join(lines))
        documents += own
    return documents


def plainly(
    documents: list[tuple[str, str]], count: Callable[[str], int], options: PrepareOptions
) -> Reference:
    """The ids that stay and what was left out, one document after the other."""
    kept: list[str] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for name, text in documents:
        if not text:
            left_out["empty"] += 1
        elif options.deduplicate and text in seen:
            left_out["duplicates"] += 1
        elif options.min_tokens is not None and count(text) < options.min_tokens:
            left_out["too short"] += 1
        elif options.max_tokens is not None and count(text) > options.max_tokens:
            left_out["too long"] += 1
        else:
            kept.append(name)
        seen.add(text)
    return kept, left_out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "chosen",
    [
        {"deduplicate": True},
        {"min_tokens": 10},
        {"max_tokens": 24},
        {"deduplicate": True, "min_tokens": 10, "max_tokens": 24},
    ],
    ids=str,
)
def test_what_stays_is_what_plain_counting_keeps(
    chosen: dict[str, int],
    seed: int,
    tokenizer_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts of a file or two, the digests resolved in many ranges."""
    monkeypatch.setattr(deduplicate, "RANGE_TEXTS", 5)
    documents = write_corpus(tmp_path / "texts", seed)
    options = PrepareOptions(
        (str(tmp_path / "texts" / "*"),),
        tokenizer_file,
        tmp_path / "shards",
        shard_tokens=100,
        part_bytes=900,
        skip_empty=True,
        **chosen,
    )
    tokenizer = load_tokenizer(tokenizer_file)
    lengths = {len(tokenizer.encode(text)) for _, text in documents}
    assert lengths >= {options.min_tokens or 10, options.max_tokens or 24}  # both bounds are met
    expected, left_out = plainly(documents, lambda text: len(tokenizer.encode(text)), options)
    prepared = prepare(options)
    assert [document.id for document in open_documents(options.output)] == expected
    assert prepared.left_out == left_out
    assert prepared.index.num_documents + sum(left_out.values()) == len(documents)
    assert len(left_out) == 1 + len(chosen) and prepared.num_parts > 1
    assert not list(verify_folder(read_index(options.output)))


def test_no_filter_leaves_nothing_out(tokenizer_file: Path, tmp_path: Path) -> None:
    """Equal texts are kept where nobody asks."""
    documents = [found for found in write_corpus(tmp_path / "texts", 0) if found[1]]
    options = PrepareOptions(
        (str(tmp_path / "texts" / "*"),), tokenizer_file, tmp_path / "shards", skip_empty=True
    )
    prepared = prepare(options)
    assert prepared.index.num_documents == len(documents) > len({text for _, text in documents})
    assert set(prepared.left_out) == {"empty"}


def test_ranges_cover_every_digest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests at both ends of what 128 bits hold, in any number of ranges."""
    monkeypatch.setattr(deduplicate, "RANGE_TEXTS", 1)
    work = WorkFolder(tmp_path)
    largest = (1 << 64) - 1
    digests = [(0, 0), (0, largest), (1 << 63, 5), (largest, 0), (largest, largest)]
    for part in range(2):
        work.part(part).mkdir(parents=True)
        table = np.array([(*halves, 10 + at) for at, halves in enumerate(digests)], np.uint64).T
        np.save(work.part(part) / "digests.npy", table)
    (work.folder / "duplicates").mkdir()
    for num_ranges in (1, 2, 3, 7):
        for number in range(num_ranges):
            deduplicate._resolve(work, 2, number, num_ranges)
        assert deduplicate.duplicates_of(work, 0).tolist() == []
        assert deduplicate.duplicates_of(work, 1).tolist() == [10, 11, 12, 13, 14]


def test_one_task_does_what_others_left_and_two_share_it(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    """A task killed at its digests, or never started, holds nobody up."""
    write_corpus(tmp_path / "texts", 1)
    alone = PrepareOptions(
        (str(tmp_path / "texts" / "*"),),
        tokenizer_file,
        tmp_path / "alone",
        shard_tokens=100,
        part_bytes=900,
        skip_empty=True,
        deduplicate=True,
    )

    def start(task: int, output: str, killed: int = 0, num_tasks: int = 3) -> subprocess.Popen[str]:
        options = replace(alone, output=tmp_path / output, task=task, num_tasks=num_tasks)
        writes = "data_pipeline.prepare.deduplicate.write_durably"
        disturbance = Disturbance(
            settings={"data_pipeline.prepare.deduplicate.LOOK_AGAIN_SECONDS": 0.01},
            kill_after=(writes, killed) if killed else None,
        )
        return start_prepare(options, disturbance, stderr=subprocess.PIPE)

    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    def ends(child: subprocess.Popen[str]) -> tuple[int, str]:
        said = child.communicate()[1]
        return child.returncode, said

    assert ends(start(0, "alone", num_tasks=1))[0] == 0
    assert ends(start(2, "shared", killed=2))[0] < 0
    assert (tmp_path / "shared" / ".unfinished").is_dir()
    for child in [start(0, "shared"), start(1, "shared")]:
        code, said = ends(child)
        assert code == 0, said
    assert not (tmp_path / "shared" / "index.json").exists()
    assert ends(start(2, "shared"))[0] == 0
    assert files("shared") == files("alone")


def test_a_task_waits_for_who_is_alive(tokenizer_file: Path, tmp_path: Path) -> None:
    """It asks again until the result is there, and then goes on."""
    write_corpus(tmp_path / "texts", 1)
    options = PrepareOptions(
        (str(tmp_path / "texts" / "*"),),
        tokenizer_file,
        tmp_path / "shards",
        part_bytes=900,
        skip_empty=True,
        deduplicate=True,
    )
    other = replace(options, output=tmp_path / "other", task=1, num_tasks=2)
    held: list[FileLock] = []
    waits: list[float] = []
    lock_part = WorkFolder.lock_part

    def first_held(work: WorkFolder, number: int) -> FileLock | None:
        if number == 0 and not held:
            held.append(lock_part(work, number))
        return lock_part(work, number)

    def release(seconds: float) -> None:
        waits.append(seconds)
        held[0].close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "lock_part", first_held)
        patch.setattr(time, "sleep", release)
        waited: Prepared = prepare(other)
    assert waits == [deduplicate.LOOK_AGAIN_SECONDS]
    assert waited.index is None and all(part % 2 == 0 for part in waited.missing_parts)
