"""What is true of checkpoints in an object store alone, against a server of S3."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.errors import InputError, StorageError
from data_pipeline.storage.interface import StorageOptions
from megadlcm.checkpoint import object_storage
from megadlcm.checkpoint.folder import open_checkpoint, storage_of
from megadlcm.checkpoint.format import BLOCK_BYTES
from megadlcm.checkpoint.object_storage import PART_BYTES, ObjectStorage
from megadlcm.config import RunConfig
from tests.support import killed_save
from tests.support.killed_save import (
    FILE,
    FIRST,
    SECOND,
    STATE,
    begin,
    content_of,
    manifest_of,
    save,
    whole,
)
from tests.support.object_server import Place
from tests.support.paths import ROOT

MakeRun = Callable[..., RunConfig]
HERE, OTHER = "a" * 32, "b" * 32


class KilledError(BaseException):
    """Stands for the end of a process: nobody catches it, and nothing is done after it."""


def dying(act: Callable[..., Any], die_at: int, made: list[str]) -> Callable[..., Any]:
    """A request, or the end before the one of that number."""

    def counted(*arguments: Any, **others: Any) -> Any:
        if len(made) == die_at:
            raise KilledError
        made.append(act.__name__)
        return act(*arguments, **others)

    return counted


def save_until(url: str, die_at: int) -> int | None:
    """Saves the second checkpoint; how many requests it took, None where it died."""
    made, files = list[str](), list[Any]()
    with pytest.MonkeyPatch.context() as patch:
        create = ObjectStorage.create

        def created(*arguments: Any) -> Any:
            files.append(create(*arguments))
            return files[-1]

        patch.setattr(ObjectStorage, "create", created)
        for owner, name in ((ObjectStorage, "_try"), (object_storage._ObjectFile, "_upload")):
            patch.setattr(owner, name, dying(getattr(owner, name), die_at, made))
        try:
            save(ObjectStorage(url), SECOND, f"{die_at:032x}")
            return len(made)
        except KilledError:
            for file in files:
                file._file.closed = True  # a dead process completes nothing
            return None


def test_a_save_that_is_killed_before_any_request_is_whole_or_not_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "PART_BYTES", 2 * BLOCK_BYTES)
    found, num_litter, num_uploads = [], 0, 0
    for number in range(100):
        place, first = Place(f"{bucket}/{number}"), manifest_of(HERE)
        for key, content in ((FILE, content_of(FIRST)), (STATE, b"{}")):
            place.put(f"{FIRST}/{HERE}/{key}", content)
        place.put(f"{FIRST}/manifest.json", first)
        is_done = save_until(place.url, number) is not None
        num_uploads += len(place.uploads())
        before, storage = len(place.listing()), ObjectStorage(place.url)
        assert storage.tidy() == [] and place.uploads() == []
        num_litter += before - len(place.listing())
        found.append(storage.names())
        attempts = {FIRST: HERE, SECOND: f"{number:032x}"}
        expected = [
            f"{name}/{key}"
            for name in found[-1]
            for key in ("manifest.json", *(f"{attempts[name]}/{f}" for f in (FILE, STATE)))
        ]
        assert sorted(set(place.listing()) - {"latest"}) == sorted(expected)
        for name in found[-1]:
            assert whole(storage, name) == content_of(name)
        if is_done:
            break
    assert 15 < len(found) < 50
    # never none, and each state is met
    assert [names for i, names in enumerate(found) if i == 0 or names != found[i - 1]] == [
        [FIRST],
        [SECOND, FIRST],
        [SECOND],
    ]
    assert num_litter and num_uploads  # the negative control: there was something to tidy


def test_a_process_that_is_killed_in_an_upload_leaves_no_part(bucket: str) -> None:
    save(ObjectStorage(bucket), FIRST, HERE)
    place = Place(bucket)
    kept = place.listing()
    program = [sys.executable, "-m", killed_save.__name__, bucket]
    assert subprocess.run(program, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    assert place.uploads() == [f"{SECOND}/{'f' * 32}/{FILE}"]
    storage = ObjectStorage(bucket)
    assert storage.tidy() == [] and place.uploads() == [] and place.listing() == kept
    assert storage.names() == [FIRST] and whole(storage, FIRST) == content_of(FIRST)


def test_a_removal_that_is_killed_leaves_no_checkpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many objects take several requests."""
    save(ObjectStorage(bucket), FIRST, HERE)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "_remove", dying(ObjectStorage._remove, 0, []))
        with pytest.raises(KilledError):
            ObjectStorage(bucket).remove(FIRST, HERE)
    storage, place = ObjectStorage(bucket), Place(bucket)
    assert storage.names() == [] and place.listing() != ["latest"]
    assert storage.tidy() == [] and place.listing() == ["latest"]


def test_of_two_starts_that_publish_at_once_exactly_one_does(bucket: str) -> None:
    attempts = [f"{number:032x}" for number in range(4)]
    storages = {attempt: ObjectStorage(bucket) for attempt in attempts}
    for attempt, storage in storages.items():
        begin(storage, FIRST, attempt)
    at_once, refused = threading.Barrier(len(attempts)), dict[str, str]()

    def publish(attempt: str) -> None:
        at_once.wait(60)
        try:
            storages[attempt].publish(FIRST, attempt, manifest_of(attempt))
        except StorageError as error:
            refused[attempt] = str(error)

    threads = [threading.Thread(target=publish, args=(attempt,)) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = set(attempts) - set(refused)
    assert set(refused.values()) == {
        f"{bucket}/{FIRST}/manifest.json: another start of the run has published it; this one does "
        "not"
    }
    storage = ObjectStorage(bucket)
    assert storage.manifest(FIRST) == manifest_of(winner)
    storages[next(iter(refused))].abandon(FIRST, next(iter(refused)))
    assert whole(storage, FIRST) == content_of(FIRST)


def test_a_start_does_not_replace_what_another_one_has_published_meanwhile(bucket: str) -> None:
    """Not even where both wanted to replace the same damaged checkpoint."""
    save(ObjectStorage(bucket), FIRST, OTHER, "damaged")
    late, early = ObjectStorage(bucket), ObjectStorage(bucket)
    begin(late, FIRST, "c" * 32)
    save(early, FIRST, HERE)
    with pytest.raises(StorageError, match="another start of the run has published it"):
        late.publish(FIRST, "c" * 32, manifest_of("c" * 32))
    assert ObjectStorage(bucket).manifest(FIRST) == manifest_of(HERE)


def test_a_lost_answer_to_the_manifest_is_no_failure(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, put = ObjectStorage(bucket), ObjectStorage._put_new
    monkeypatch.setattr(
        ObjectStorage, "_put_new", lambda *arguments: put(*arguments) and put(*arguments)
    )
    save(storage, FIRST, HERE)
    assert storage.names() == [FIRST]


def test_a_large_file_goes_in_parts_of_whole_blocks(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PART_BYTES % BLOCK_BYTES == 0
    monkeypatch.setattr(object_storage, "PART_BYTES", 2 * BLOCK_BYTES)
    place, storage = Place(bucket), ObjectStorage(bucket)
    file: Any = storage.create(FIRST, HERE, FILE)
    for _ in range(3):
        file.write(bytes(BLOCK_BYTES))
    assert place.uploads() == [f"{FIRST}/{HERE}/{FILE}"]
    (part,) = file._file.parts
    assert part["PartNumber"] == 1 and file._file.buffer.tell() == BLOCK_BYTES
    # given up, and not completed by the collector of garbage
    file.abandon()
    del file
    gc.collect()
    assert place.uploads() == [] and place.listing() == []
    # of a process that is gone, and of another run in the same bucket
    for url in (bucket, f"{bucket}-of-another"):
        each: Any = ObjectStorage(url).create(FIRST, HERE, FILE)
        each.write(bytes(2 * BLOCK_BYTES))
        each._file.closed = True
    assert place.uploads() != []
    assert ObjectStorage(bucket).tidy() == [] and place.uploads() == []
    assert Place(f"{bucket}-of-another").uploads() != []


def test_a_place_without_a_manifest_is_no_checkpoint(bucket: str) -> None:
    place, storage = Place(bucket), ObjectStorage(bucket)
    begin(storage, FIRST, HERE)
    for key in (f"{SECOND}/rank_00000.safetensors", f"old/{FIRST}/manifest.json", "step_1/x"):
        place.put(key, b"{}")
    place.put("step_1/manifest.json", b"{}")
    assert ObjectStorage(bucket).names() == []
    place.put(f"{SECOND}/manifest.json", b"torn")
    assert ObjectStorage(bucket).names() == [SECOND]
    with pytest.raises(InputError, match=r"manifest\.json: it is damaged"):
        open_checkpoint(ObjectStorage(bucket), SECOND)


def test_bytes_that_are_cut_on_the_way_are_asked_for_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(ObjectStorage(bucket), FIRST, HERE)
    storage = ObjectStorage(bucket, StorageOptions(attempts=2, wait_seconds=0.0))
    storage.manifest(FIRST)
    lost = [1]

    def hurried(call: Callable[[], Any], num_bytes: int = 0) -> Any:
        answer = call()
        return answer[: -lost.pop()] if lost else answer

    monkeypatch.setattr(object_storage, "within_patience", hurried)
    assert whole(storage, FIRST) == content_of(FIRST) and not lost
    assert "attempt 1 failed (31 of 32 bytes arrived)" in caplog.text
    lost = [1, 1]
    with pytest.raises(StorageError, match=r"00000.safetensors: cannot be read after 2 attempts"):
        whole(storage, FIRST)


def test_a_store_that_fails_is_told_in_one_line_without_its_password(
    server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StorageOptions(attempts=2, wait_seconds=0.0)
    nowhere = ObjectStorage("s3://no-such-bucket/run", options)
    for act in (nowhere.names, lambda: nowhere.begin(FIRST, HERE, 1)):
        with pytest.raises(StorageError, match="there is no no-such-bucket; make it") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert len(nowhere.tidy()) == 1  # costs no start
    file = nowhere.create(FIRST, HERE, FILE)
    file.write(b"1")
    with pytest.raises(StorageError, match=rf"no-such-bucket/run/{FIRST}.*cannot be written"):
        file.finish()
    file.abandon()
    secret = ObjectStorage("s3://me:hunter2@no-such-bucket/run?token=hunter3", options)
    for act in (secret.names, lambda: secret.publish(FIRST, HERE, b"")):
        with pytest.raises(StorageError) as caught:
            act()
        assert "hunter" not in str(caught.value) and "***" in str(caught.value)
    assert "hunter" not in secret.where(FIRST)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("https://host/checkpoints", "a web server takes no checkpoints"),
        ("s4://bucket/run", "knows no s4:// URLs"),
        ("s3://me:***@bucket/run", "its password was masked"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_run_begins(
    make_run: MakeRun, folder: str, problem: str
) -> None:
    config = make_run(checkpoint={"folder": folder})
    with pytest.raises(InputError, match=problem) as caught:
        storage_of(config)
    assert "\n" not in str(caught.value)
