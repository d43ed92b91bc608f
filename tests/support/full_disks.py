"""Disks that do not take what is written: a small one that runs full, and a limit for all files."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Lets this process write no file beyond a size; what is written before that stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int, num_files: int = 1000) -> Iterator[Path]:
    """A file system of its own at an empty folder; skips the test where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={num_bytes},nr_inodes={num_files}"
    command = ["mount", "-t", "tmpfs", "-o", size, "none", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no command `mount`; install util-linux")
    if done.returncode:
        pytest.skip(f"no disk may be mounted here ({done.stderr.strip()}); run the tests as root")
    try:
        yield folder
    finally:
        # lazily: a process that a failed test left behind may be in there
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, free_bytes: int) -> Path:
    """Fills a disk but for so many bytes, rounded down to blocks; returns what to remove again."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - free_bytes)
    return filler
