"""A prepare that fails or is killed takes nothing away, and the next one finds a clean folder."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import read_index
from data_pipeline.errors import InputError, StorageError
from data_pipeline.inspection.verify import verify_folder
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from tests.support.full_disks import fill, small_disk
from tests.support.prepare_process import Disturbance, start_prepare
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl

MakeShards = Callable[..., Path]


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by their path in it, those of its subfolders too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def finished_files(folder: Path) -> dict[str, bytes]:
    """Returns those that are not of an unfinished prepare."""
    return {name: found for name, found in files(folder).items() if "unfinished/" not in name}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_prepare_leaves_the_tokenizer_it_was_given(
    workers: int, make_shards: MakeShards, tokenizer_file: Path, tmp_path: Path
) -> None:
    """The file lies where the shards go; the same command then works on better text."""
    folder = tmp_path / "shards"
    folder.mkdir()
    given = folder / "tokenizer.json"
    given.write_bytes(tokenizer_file.read_bytes())
    options = {"tokenizer": given, "workers": workers}
    with pytest.raises(InputError, match="is empty"):
        make_shards(texts=[*TEXTS, ""], **options)
    assert files(folder) == {"tokenizer.json": tokenizer_file.read_bytes()}
    make_shards(texts=[*TEXTS, ""], skip_empty=True, **options)
    assert read_index(folder).num_documents == len(TEXTS)
    assert given.read_bytes() == tokenizer_file.read_bytes()


def test_finished_shards_are_replaced_only_on_request(make_shards: MakeShards) -> None:
    """And then leave nothing of the earlier ones behind."""
    folder = make_shards(shard_tokens=20)
    before = files(folder)
    with pytest.raises(InputError, match=r"holds finished shards.*--overwrite") as error:
        make_shards()
    one_line(error)
    assert files(folder) == before
    make_shards(overwrite=True, tokenizer=folder / "tokenizer.json")
    assert len(files(folder)) < len(before)
    assert not list(verify_folder(read_index(folder)))
    again = make_shards("again")
    assert files(folder) == files(again)


def test_finished_shards_outlive_a_prepare_that_fails(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the last document, or before the last file: --overwrite replaces the whole."""
    monkeypatch.setattr("data_pipeline.prepare.pieces.PIECE_BYTES", 50)
    monkeypatch.setattr("data_pipeline.prepare.encode.BATCH_BYTES", 1)
    folder = make_shards(shard_tokens=20)
    before = files(folder)
    for texts, message in (([*TEXTS[::-1], ""], "is empty"), ([""], "is empty")):
        with pytest.raises(InputError, match=message):
            make_shards(texts=texts, overwrite=True, shard_tokens=20)
        assert finished_files(folder) == before
    with pytest.raises(InputError, match="no documents"):
        make_shards(texts=[""], overwrite=True, skip_empty=True)
    assert finished_files(folder) == before

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.prepare.publish.write_durably", full)
        with pytest.raises(StorageError, match=r"no space left.*start the same command") as error:
            make_shards(texts=TEXTS[::-1], overwrite=True, shard_tokens=20)
        one_line(error)
    assert finished_files(folder) == before
    make_shards(texts=TEXTS[::-1], overwrite=True, shard_tokens=20)
    assert files(folder) != before


def test_a_failed_prepare_leaves_no_index(make_shards: MakeShards, tmp_path: Path) -> None:
    """Nor anything else, where no shard was finished."""
    with pytest.raises(InputError, match="is empty"):
        make_shards(texts=[*TEXTS, ""])
    folder = tmp_path / "shards"
    assert list(folder.iterdir()) == []
    with pytest.raises(InputError, match=r"no index\.json"):
        read_index(folder)


CLOSING = "data_pipeline.prepare.parts.PartWriter._close_shard"
PUBLISHING = "data_pipeline.prepare.publish.sync_path"


def killed_prepare(function: str, call: int, options: PrepareOptions) -> None:
    """Prepares in a process that is killed after some call of a function."""
    child = start_prepare(options, Disturbance(kill_after=(function, call)))
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_prepare_leaves_what_was_there(
    earlier: bool, tokenizer_file: Path, tmp_path: Path
) -> None:
    """SIGKILL mid-input, three shards written: no index, or the earlier one with all its shards."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    output = tmp_path / "shards"
    if earlier:
        prepare(PrepareOptions((str(source),), tokenizer_file, output, shard_tokens=70))
    before = finished_files(output)
    options = PrepareOptions(
        (str(source),), tokenizer_file, output, shard_tokens=100, overwrite=True
    )
    killed_prepare(CLOSING, 3, options)
    assert len(list(output.glob(".unfinished/parts/000000/*.tar"))) == 3
    assert finished_files(output) == before and bool(before) == earlier
    options = replace(options, shard_tokens=10_000)
    prepare(options)
    prepare(replace(options, output=tmp_path / "undisturbed"))
    assert files(output) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("call", [1, 2])
def test_a_folder_killed_between_its_old_and_its_new_shards_is_unfinished(
    call: int, tokenizer_file: Path, tmp_path: Path
) -> None:
    """Before the first file is moved, and before the index is."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    output = tmp_path / "shards"
    options = PrepareOptions((str(source),), tokenizer_file, output, shard_tokens=100)
    prepare(replace(options, shard_tokens=70))
    killed_prepare(PUBLISHING, call, replace(options, overwrite=True))
    assert (output / ".unfinished").exists() and list(output.glob("*.tar"))
    with pytest.raises(InputError, match=r"no index\.json"):
        read_index(output)
    prepare(options)
    prepare(replace(options, output=tmp_path / "undisturbed"))
    assert files(output) == files(tmp_path / "undisturbed")


def test_only_its_own_files_are_removed(make_shards: MakeShards, tmp_path: Path) -> None:
    """A folder may hold a note of its owner."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "NOTE.txt").write_text("mine")
    (folder / "shard-000099.tar").write_text("left by a killed run")
    make_shards()
    assert (folder / "NOTE.txt").read_text() == "mine"
    assert not (folder / "shard-000099.tar").exists()


def test_another_tokenizer_is_replaced_only_on_request(
    make_shards: MakeShards, tmp_path: Path
) -> None:
    """It may be the one that another corpus was prepared with."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(InputError, match=r"holds another tokenizer\.json.*--overwrite") as error:
        make_shards()
    one_line(error)
    assert files(folder) == {"tokenizer.json": b"another"}
    make_shards(overwrite=True)
    assert not list(verify_folder(read_index(folder)))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """With the file, what is free, and exit code 1; the finished folder is that of a whole disk."""
    source = write_jsonl(tmp_path / "texts.jsonl", [text * 40 for text in TEXTS])
    options = PrepareOptions((str(source),), tokenizer_file, tmp_path / "whole", shard_tokens=100)
    prepare(options)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        options = replace(options, output=disk / "shards")
        for free_bytes in (0, 8192, 24576):
            filler = fill(disk, free_bytes)
            with pytest.raises(StorageError) as failed:
                prepare(options)
            line = one_line(failed)
            assert line.startswith(f"{disk}/shards/.unfinished/"), line
            assert "cannot be written (No space left on device); " in line
            assert re.search(rf" [\d,]+ bytes free in {disk}/shards", line)
            filler.unlink()
        prepare(options)
        assert files(disk / "shards") == files(tmp_path / "whole")


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_files_have_the_modes_of_the_umask(make_shards: MakeShards, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = make_shards(shard_tokens=20)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask) and "index.json" in modes
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
