"""Processes that share a prepare, or get in each other's way, or come too late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from data_pipeline import read_index
from data_pipeline.commands.data import add_data_parser
from data_pipeline.errors import InputError, StorageError
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.output_folder import write_durably
from data_pipeline.prepare import parts
from data_pipeline.prepare.work_folder import WorkFolder
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.storage.locks import FileLock
from tests.support.prepare_process import Disturbance, start_prepare
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl

NUM_FILES = 6


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by their path in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def options(tokenizer_file: Path, tmp_path: Path) -> PrepareOptions:
    """For six files, each a part of several shards."""
    (tmp_path / "texts").mkdir()
    for number in range(NUM_FILES):
        texts = [f"{number} {text}" for text in TEXTS * (1 + number % 3)]
        write_jsonl(tmp_path / "texts" / f"{number}.jsonl", texts)
    return PrepareOptions(
        (str(tmp_path / "texts" / "*"),),
        tokenizer_file,
        tmp_path / "shards",
        shard_tokens=120,
        part_bytes=1,
    )


@pytest.fixture
def undisturbed(options: PrepareOptions, tmp_path: Path) -> dict[str, bytes]:
    """What a single process makes of them."""
    index = prepare(replace(options, output=tmp_path / "undisturbed")).index
    assert len(index.shards) > 2 * NUM_FILES
    assert not list(verify_folder(index))
    return files(tmp_path / "undisturbed")


def run_tasks(options: PrepareOptions, tasks: list[int]) -> None:
    """Runs tasks one after the other; the last finishes the folder."""
    for at, task in enumerate(tasks):
        result = prepare(replace(options, task=task))
        assert (result.index is not None) == (at == len(tasks) - 1)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_tasks_in_any_order_write_what_one_process_does(
    num_tasks: int, options: PrepareOptions, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """More tasks than parts, too: those have nothing to do, and one of them may be the last."""
    orders = list(permutations(range(num_tasks)))
    orders = orders[:: -(-len(orders) // 6)]
    for at, order in enumerate(orders):
        own = replace(options, output=tmp_path / f"{at}", num_tasks=num_tasks)
        if num_tasks <= NUM_FILES:
            run_tasks(own, list(order))
        else:
            for task in order:
                prepare(replace(own, task=task))
        assert files(own.output) == undisturbed


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_of_tasks_write_what_one_process_does(
    workers: int,
    options: PrepareOptions,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches small enough that the workers finish out of turn."""
    monkeypatch.setattr("data_pipeline.prepare.pieces.PIECE_BYTES", 200)
    monkeypatch.setattr("data_pipeline.prepare.encode.BATCH_BYTES", 300)
    run_tasks(replace(options, workers=workers, num_tasks=2), [1, 0])
    assert files(options.output) == undisturbed


def test_missing_parts_are_named_and_the_rest_may_be_shared_otherwise(
    options: PrepareOptions, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task 1 of 4 never ends: one process does what is left, and only that."""
    for task in (0, 2, 3):
        prepared = prepare(replace(options, task=task, num_tasks=4))
    assert prepared.missing_parts == (1, 5)
    assert prepared.whats_missing.startswith("2 of 6 parts are missing, of the tasks 1 of 4;")
    with pytest.raises(InputError, match=r"no index\.json"):
        read_index(options.output)
    done = options.output / ".unfinished" / "parts" / "000000" / "000000.tar"
    before = done.stat()
    numbers: list[int] = []
    lock_part = WorkFolder.lock_part

    def counted(work: WorkFolder, number: int) -> FileLock | None:
        numbers.append(number)
        return lock_part(work, number)

    monkeypatch.setattr(WorkFolder, "lock_part", counted)
    prepare(options)
    assert numbers == [1, 5]
    moved = (options.output / "shard-000000.tar").stat()
    assert (moved.st_ino, moved.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert files(options.output) == undisturbed


def test_a_finished_folder_is_left_as_it_is(
    options: PrepareOptions, undisturbed: dict[str, bytes]
) -> None:
    """By the same plan, whatever the task; a late task of an array does not even overwrite it."""
    first = prepare(options)
    assert not first.was_finished
    stamps = {path: path.stat().st_mtime_ns for path in options.output.iterdir()}
    for late in (
        options,
        replace(options, task=3, num_tasks=5, workers=2),
        replace(options, task=3, num_tasks=5, overwrite=True),
    ):
        again = prepare(late)
        assert again.was_finished and again.index.fingerprint == first.index.fingerprint
        assert {path: path.stat().st_mtime_ns for path in options.output.iterdir()} == stamps
    tar = options.output / "shard-000001.tar"
    tar.write_bytes(b"damaged")
    assert not prepare(replace(options, overwrite=True)).was_finished
    assert files(options.output) == undisturbed


def test_work_by_another_plan_is_not_mixed_with(
    options: PrepareOptions, undisturbed: dict[str, bytes]
) -> None:
    """What differs is said; --overwrite begins anew, the first plan goes on."""
    prepare(replace(options, num_tasks=2))
    before = files(options.output)
    text = Path(options.inputs[0]).parent / "3.jsonl"
    others = [
        (replace(options, shard_tokens=99), r"--shard-tokens was 120, is 99"),
        (replace(options, deduplicate=True), r"--deduplicate was False, is True"),
        (replace(options, inputs=(str(text),)), r"input 3\.jsonl where 0\.jsonl was"),
    ]
    for other, message in others:
        with pytest.raises(InputError, match=rf"begun by another plan \({message}") as error:
            prepare(other)
        one_line(error)
        assert files(options.output) == before
    contents = text.read_bytes()
    text.write_bytes(contents + b"\n")
    with pytest.raises(InputError, match=r"input 3\.jsonl had .* bytes, has "):
        prepare(options)
    text.write_bytes(contents)
    run_tasks(replace(options, num_tasks=2), [1])
    assert files(options.output) == undisturbed
    anew = replace(options, shard_tokens=99, overwrite=True)
    prepare(replace(anew, num_tasks=2))
    prepare(options)  # the finished folder is that of this plan: what was begun stays begun
    assert (options.output / ".unfinished").exists()
    assert len(prepare(anew).index.shards) > len(undisturbed) // 2 - 2
    assert not (options.output / ".unfinished").exists()


@contextmanager
def living(options: PrepareOptions, task: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is at the first part of its task until it is killed."""
    own = replace(options, task=task, num_tasks=2)
    with start_prepare(own, Disturbance(hold=True), stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == "[]\n"
            yield child
        finally:
            child.kill()


def test_two_processes_at_one_part_are_told_apart(
    options: PrepareOptions, undisturbed: dict[str, bytes]
) -> None:
    """The second is refused, another plan too; when the first was killed, all goes on."""
    with ExitStack() as stack:
        first = stack.enter_context(living(options, 0))
        second = stack.enter_context(living(options, 1))
        with pytest.raises(InputError, match=r"another process is at part 0.*--task") as error:
            prepare(options)
        one_line(error)
        with pytest.raises(InputError, match="other processes are preparing it by another plan"):
            prepare(replace(options, shard_tokens=99, overwrite=True))
        for child in (first, second):
            child.send_signal(signal.SIGKILL)
            child.wait()
    prepare(options)
    assert files(options.output) == undisturbed


def test_a_task_whose_work_was_finished_meanwhile_sees_it(
    options: PrepareOptions, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at what is missing and its first lock another process does everything."""
    lock_part = WorkFolder.lock_part

    def late(work: WorkFolder, number: int) -> FileLock | None:
        monkeypatch.setattr(WorkFolder, "lock_part", lock_part)
        monkeypatch.setattr(WorkFolder, "join", lambda work: ExitStack())
        prepare(options)
        return lock_part(work, number)

    monkeypatch.setattr(WorkFolder, "lock_part", late)
    assert prepare(options).index is not None
    assert files(options.output) == undisturbed


def test_a_full_disk_is_named_and_the_work_goes_on_when_there_is_room(
    options: PrepareOptions, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was finished is lost; nothing is finished that is not."""
    written: list[Path] = []
    write = write_durably

    def full(path: Path, contents: bytes) -> None:
        if len(written) == 13:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_durably", full)
        with pytest.raises(StorageError, match=r"No space left.*the same command again") as error:
            prepare(options)
    one_line(error)
    finished = [path for path in written if path.match("[0-9]*.json")]
    assert len(finished) > 2
    stamps = [path.stat().st_mtime_ns for path in finished]
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "finish", lambda work: None)
        prepare(options)
        assert [path.stat().st_mtime_ns for path in finished] == stamps
    prepare(options)
    assert files(options.output) == undisturbed


def test_workers_end_with_a_parent_that_was_killed(options: PrepareOptions, tmp_path: Path) -> None:
    """Nobody else would end them."""
    own = replace(options, num_tasks=2, workers=2)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # trackers complain of it
    with start_prepare(own, Disturbance(hold=True), **pipes) as parent:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 2 and all(map(alive, workers))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, workers))


def alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return b") Z " not in Path(f"/proc/{process}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_tasks_that_cannot_be_meant_are_refused(options: PrepareOptions) -> None:
    """Before anything is written."""
    for chosen, message in (
        ({"task": 2, "num_tasks": 2}, "--task 2: must be >= 0 and below --num-tasks 2"),
        ({"task": -1}, "--task -1"),
        ({"num_tasks": 0}, "--num-tasks 0"),
        ({"part_bytes": 0}, "--part-bytes 0"),
        ({"min_tokens": 0}, "--min-tokens 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "--max-tokens 8: must be >= --min-tokens 9"),
    ):
        with pytest.raises(InputError, match=message) as error:
            prepare(replace(options, **chosen))
        one_line(error)
    assert not os.path.exists(options.output)


def test_the_command_says_what_is_missing_and_what_is_finished(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are no failure: the tasks of an array end with 0."""
    parser = ArgumentParser()
    add_data_parser(parser.add_subparsers(required=True))
    words = ["data", "prepare", "--input", options.inputs[0], "--output", str(options.output)]
    words += ["--tokenizer", str(options.tokenizer), "--part-bytes", "1", "--deduplicate"]
    said = []
    for more in (["--task", "1", "--num-tasks", "2"], ["--workers", "2"], []):
        arguments = parser.parse_args([*words, *more])
        assert arguments.run(arguments) == 0
        said.append(capsys.readouterr().out)
    assert "3 of 6 parts are missing, of the tasks 0 of 2" in said[0]
    assert said[1].splitlines()[0].split()[:5] == (
        ["domain", "documents", "tokens", "bytes", "bytes/token"]
    )
    assert f"left out: {(1 + 2) * 2 * len(TEXTS)} duplicates" in said[1]
    assert said[1].endswith(f"{options.output}: 6 shards\n")
    assert said[2] == said[1].replace("6 shards", "6 shards, already finished")
