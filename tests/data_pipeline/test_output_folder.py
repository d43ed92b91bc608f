"""Files that are whole or as they were, and one line where the disk does not take them."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, StorageError
from data_pipeline.output_folder import (
    disk_error,
    make_output_folder,
    reading,
    reading_and_writing,
    write_durably,
    writing,
)
from tests.support.full_disks import fill, largest_file, small_disk

FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE]


@pytest.mark.parametrize("number", FULL, ids=errno.errorcode.get)
def test_what_the_disk_says_is_one_line_with_file_and_room(tmp_path: Path, number: int) -> None:
    path = tmp_path / "not" / "there" / "file"
    with pytest.raises(StorageError) as failed, writing(path, 12345):
        raise OSError(number, os.strerror(number))
    line = str(failed.value)
    reason = f"{path}: cannot be written ({os.strerror(number)})"
    assert line.startswith(f"{reason}; 12,345 bytes needed, ")
    assert re.search(rf" needed, [\d,]+ bytes free in {tmp_path}; make room there", line)
    assert "\n" not in line


def test_an_error_that_knows_its_file_is_believed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^inner: cannot be written"), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "inner")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EEXIST])
@pytest.mark.parametrize("net", [writing, reading, reading_and_writing])
def test_what_is_not_of_the_disk_passes_as_it_is(
    tmp_path: Path, number: int, net: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with pytest.raises(OSError, match="as it is") as failed, net(tmp_path):
        raise OSError(number, "as it is")
    assert failed.value.errno == number


def test_what_the_disk_does_not_give_is_told_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to("/proc/self/mem")  # nothing is mapped where it begins
    with pytest.raises(StorageError) as failed, reading(path):
        path.read_bytes()
    assert str(failed.value).startswith(f"{path}: cannot be read (Input/output error); look after")


def test_a_net_below_reads_and_writes_says_no_more_than_it_knows(tmp_path: Path) -> None:
    known = [
        (errno.ENOSPC, None, StorageError, rf"^{tmp_path}: cannot be written \(No space left"),
        (errno.ESTALE, "one", StorageError, r"^one: cannot be read or written \(Stale"),
        (errno.EIO, None, OSError, "Input/output"),
    ]
    for number, name, kind, said in known:
        with pytest.raises(kind, match=said), reading_and_writing(tmp_path):
            raise OSError(number, os.strerror(number), name)


def test_a_file_that_does_not_fit_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"earlier")
    with (
        largest_file(1000),
        pytest.raises(StorageError, match=r"File too large\); 2,000 bytes needed"),
    ):
        write_durably(path, bytes(2000))
    assert path.read_bytes() == b"earlier"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    write_durably(path, bytes(2000))
    assert path.stat().st_size == 2000


def test_a_folder_on_a_full_disk_is_no_wrong_input(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 65536, num_files=3) as disk:
        filler = fill(disk, 0)  # the disk has no room for a third file
        with pytest.raises(StorageError, match=rf"{disk}/below: cannot .*; 0 bytes free in {disk}"):
            make_output_folder(disk / "below", "--output")
        filler.unlink()
        make_output_folder(disk / "below", "--output")
        assert list((disk / "below").iterdir()) == []


def test_a_file_in_place_of_a_folder_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--output .*/file: must be a folder .*it is a file"):
        make_output_folder(tmp_path / "file", "--output")
    assert (tmp_path / "file").is_file()


def test_what_is_tried_leaves_nothing(tmp_path: Path) -> None:
    make_output_folder(tmp_path / "a" / "b", "--output")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    assert "needed" not in str(disk_error(tmp_path / "a", "why"))  # unless it is known
