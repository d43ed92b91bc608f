"""Where checkpoints lie: the same is true of a folder and of an object store."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from megadlcm.checkpoint.folder import find_checkpoint, storage_at, storage_of
from megadlcm.checkpoint.format import BLOCK_BYTES
from megadlcm.checkpoint.load_model import load_model
from megadlcm.checkpoint.resume import resume
from megadlcm.commands.main import main
from megadlcm.config import RunConfig
from megadlcm.run_folder.start import prepare_run_folder
from tests.support.checkpoints import start_again, train
from tests.support.killed_save import (
    FILE,
    FIRST,
    SECOND,
    begin,
    content_of,
    manifest_of,
    save,
    whole,
)
from tests.support.object_server import Place
from tests.support.tiny_runs import tiny_engine

MakeRun = Callable[..., RunConfig]
HERE, OTHER = "a" * 32, "b" * 32


def test_what_was_published_is_read_by_another_start(place: Place) -> None:
    storage = storage_at(place.url)
    assert storage.names() == [] and storage.pins() == set() and storage.tidy() == []
    begin(storage, FIRST, HERE)
    assert storage_at(place.url).names() == []  # not before it is published
    storage.publish(FIRST, HERE, manifest_of(HERE))
    save(storage, SECOND, HERE)  # and removes the first one
    other = storage_at(place.url)
    assert other.names() == [SECOND]
    assert other.manifest(SECOND) == manifest_of(HERE)
    content = content_of(SECOND)
    assert other.size(SECOND, FILE) == len(content) and whole(other, SECOND) == content
    part = memoryview(bytearray(BLOCK_BYTES))
    start = BLOCK_BYTES + 5
    assert other.read(SECOND, FILE, start, part) == BLOCK_BYTES
    assert part == content[start : start + BLOCK_BYTES]
    assert other.read(SECOND, FILE, len(content) - 3, part) == 3  # fewer where it ends
    assert other.read(SECOND, FILE, len(content) + 1, part) == 0
    assert place.get("latest") == f"{SECOND}\n".encode()
    assert other.where(SECOND) == f"{place.url}/{SECOND}"
    # as rank 0 tells the others
    assert whole(pickle.loads(pickle.dumps(other)), SECOND) == content


def test_what_is_not_there_is_told_as_such(place: Place) -> None:
    storage = storage_at(place.url)
    save(storage, FIRST, HERE)
    for act in (
        lambda: storage.manifest(SECOND),
        lambda: storage.size(SECOND, FILE),
        lambda: storage.size(FIRST, "none"),
    ):
        with pytest.raises(FileNotFoundError):
            act()
    storage.remove(FIRST, HERE)
    with pytest.raises(FileNotFoundError):
        storage.manifest(FIRST)
    assert storage.names() == [] and place.listing() == ["latest"]


def test_a_pinned_checkpoint_stays(place: Place) -> None:
    storage_at(place.url).set_pins([FIRST])
    storage = storage_at(place.url)
    assert storage.pins() == {FIRST} and place.get("pins") == f"{FIRST}\n".encode()
    for name in (FIRST, SECOND, "step_0000000003"):
        save(storage, name, HERE)
    assert storage.names() == ["step_0000000003", FIRST]


def test_a_damaged_checkpoint_gives_its_name_to_a_new_one(place: Place) -> None:
    save(storage_at(place.url), FIRST, OTHER, "damaged")
    storage = storage_at(place.url)
    save(storage, FIRST, HERE, "whole")
    assert storage.manifest(FIRST) == manifest_of(HERE, "whole")
    assert whole(storage_at(place.url), FIRST) == content_of(FIRST)
    storage.tidy()
    assert not [key for key in place.listing() if OTHER in key]  # nor does it take room


def test_a_save_that_is_given_up_leaves_nothing(place: Place) -> None:
    storage = storage_at(place.url)
    begin(storage, FIRST, HERE)
    file = storage.create(FIRST, HERE, "state.json")
    file.write(b"half")
    file.abandon()
    assert not [key for key in place.listing() if key.endswith("state.json")]
    storage.abandon(FIRST, HERE)
    assert place.listing() == [] and storage.names() == []
    save(storage, FIRST, HERE)  # the same start tries again
    storage.abandon(FIRST, HERE)  # and fails after it was published
    assert storage.names() == [FIRST] and whole(storage, FIRST) == content_of(FIRST)


def test_a_start_removes_what_killed_ones_left_and_nothing_else(place: Place) -> None:
    save(storage_at(place.url), FIRST, OTHER)
    place.put("notes.txt", b"of somebody")
    kept = place.listing()
    for attempt in (HERE, OTHER):
        begin(storage_at(place.url), SECOND, attempt)
    begin(storage_at(place.url), FIRST, HERE)
    assert len(place.listing()) == len(kept) + 3
    storage = storage_at(place.url)
    assert storage.tidy() == [] and place.listing() == kept
    assert whole(storage, FIRST) == content_of(FIRST)


def test_a_run_is_saved_and_resumed(
    place: Place,
    make_run: MakeRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_run(checkpoint={"folder": place.url})
    engine = train(config, 2, save_at=(1, 2))
    prepare_run_folder(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with caplog.at_level(logging.INFO):
        resumed, state = start_again(config)
    assert state.step == 2 and f"resumed from {place.url}/{SECOND} (step 2" in caplog.text
    expected = engine.model.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in resumed.model.state_dict().items())
    # from the run folder, whose config says where
    assert find_checkpoint(config.output_dir).step == 2
    for path in (config.output_dir, f"{place.url}/{SECOND}"):
        assert all(torch.equal(expected[k], v) for k, v in load_model(path).state_dict().items())
    for words in (["list"], ["verify", "--quick"], ["inspect"]):
        assert main(["checkpoint", *words, config.output_dir, "--json"]) == 0
        assert f"{place.url}/{SECOND}" in capsys.readouterr().out
    assert main(["checkpoint", "pin", config.output_dir, "1"]) == 0
    assert storage_of(config).pins() == {FIRST}
    # one bit of the newest is named, and costs its own steps
    place.flip(next(key for key in place.listing() if SECOND in key and key.endswith(FILE)), 5000)
    with caplog.at_level(logging.WARNING):
        assert start_again(config)[1].step == 1
    assert f"{SECOND}: rank 0: {FILE}: block 0 (bytes 0 on) has another checksum" in caplog.text


def test_a_run_does_not_start_from_scratch_where_its_checkpoints_are_elsewhere(
    place: Place, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    config, moved = make_run(), make_run(checkpoint={"folder": place.url})
    assert resume(tiny_engine(moved), moved) is None  # a new run
    train(config, 2, save_at=(1, 2))
    prepare_run_folder(config)
    with pytest.raises(InputError) as caught:
        resume(tiny_engine(moved), moved)
    said, old = str(caught.value), f"{config.output_dir}/checkpoints"
    assert said.startswith(f"checkpoint.folder = {place.url}: it has no checkpoint, and the run ")
    assert f"{old} (the newest is {SECOND}); copy them" in said and "\n" not in said
    # the way out that the line names: a folder is copied as it is
    for path in Path(old).rglob("*"):
        if path.is_file():
            place.system.makedirs(f"{place.url}/{path.parent.relative_to(old)}", exist_ok=True)
            place.put(str(path.relative_to(old)), path.read_bytes())
    assert storage_at(place.url).tidy() == []
    with caplog.at_level(logging.INFO):
        assert start_again(moved)[1].step == 2
    assert f"checkpoint.folder: None -> '{place.url}'" in caplog.text
