"""Files and folders on paths, read again where a read fails for a while."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.local import LocalFile, LocalFolder

OPTIONS = StorageOptions(attempts=3, wait_seconds=0.0)


def io_error() -> OSError:
    return OSError(errno.EIO, "no answer")


@pytest.fixture
def file(tmp_path: Path) -> LocalFile:
    """A file of the bytes 0 to 99."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return LocalFile(str(path), OPTIONS)


def test_any_part_of_a_file_is_read(file: LocalFile) -> None:
    assert file.pread(10, 20) == bytes(range(20, 30))
    assert file.pread(10, 95) == bytes(range(95, 100))
    assert file.pread(10, 200) == b""


def patch_pread(
    monkeypatch: pytest.MonkeyPatch, pread: Callable[[int, int, int], bytes]
) -> list[tuple[int, int]]:
    """Replaces os.pread; returns the list of (size, offset) that it is asked for."""
    calls: list[tuple[int, int]] = []

    def recorded(descriptor: int, size: int, offset: int) -> bytes:
        calls.append((size, offset))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", recorded)
    return calls


def test_short_reads_are_put_together(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    calls = patch_pread(monkeypatch, lambda file, size, at: pread(file, min(size, 3), at))
    assert file.pread(10, 20) == bytes(range(20, 30))
    assert len(calls) > 3


def test_failing_reads_are_tried_again(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, failures = os.pread, [io_error(), io_error()]

    def flaky(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise failures.pop()
        return pread(descriptor, size, offset)

    patch_pread(monkeypatch, flaky)
    assert file.pread(10, 20) == bytes(range(20, 30))
    assert not failures


def test_reads_that_go_on_failing_name_the_file(
    file: LocalFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, size: int, offset: int) -> bytes:
        raise io_error()

    patch_pread(monkeypatch, broken)
    with pytest.raises(StorageError, match=f"^{tmp_path / 'file'}: .* 3 attempts"):
        file.pread(10, 20)


def test_a_file_is_closed_with_its_last_reference(file: LocalFile) -> None:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)  # the lowest that is free now is the one the next open takes
    assert file.pread(1, 0) == b"\0"
    other = LocalFile(file._path, OPTIONS)
    assert other._descriptor == descriptor and os.fstat(descriptor)
    del other
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_that_is_not_there_leaves_nothing_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalFile(str(tmp_path / "absent"), OPTIONS)


def test_a_folder_tells_its_files(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"123")
    (tmp_path / "a").write_bytes(b"")
    folder = LocalFolder(str(tmp_path), OPTIONS)
    assert folder.location == str(tmp_path) and folder.path("b") == str(tmp_path / "b")
    assert folder.exists() and not LocalFolder(str(tmp_path / "c"), OPTIONS).exists()
    assert folder.names() == ["a", "b"]
    assert (folder.size("a"), folder.size("b")) == (0, 3)
    assert folder.read_bytes("b") == folder.open("b", 3, bytes(32)).pread(9, 0) == b"123"
    assert not folder.distrust("b") and folder.size("b") == 3
    for read in (folder.size, folder.read_bytes, lambda name: folder.open(name, 3, bytes(32))):
        with pytest.raises(FileNotFoundError):
            read("absent")


def test_a_folder_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")
    listdir, failures = os.listdir, [io_error(), io_error()]

    def flaky(path: Path) -> list[str]:
        if failures:
            raise failures.pop()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", flaky)
    assert LocalFolder(str(tmp_path), OPTIONS).names() == ["a"]
    assert not failures
