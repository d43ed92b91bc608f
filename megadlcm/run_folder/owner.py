"""Which start of a run may write to its folder: one, until it ends or is killed.

`owner.json` says who holds the folder, and is locked meanwhile: the system takes the lock of a
killed process back, on NFS that of a machine that is gone as well, once the server notices. So a
file that nobody has locked is a dead holder's, and is taken over. Where the file system knows no
locks, the file itself is the lock: only one start can make it, and it is taken over where its
holder is known to be dead, which can be seen on the holder's machine alone.

Who removes the file takes the lock of it away. So the holder locks the folder as well, which every
local file system and most others keep for the processes of one machine.

Some file systems keep locks on one machine only: a file that a start on another one has left is
taken over with a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, StorageError
from data_pipeline.output_folder import write_durably, writing
from data_pipeline.small_file import open_ordinary
from data_pipeline.storage.locks import (
    FileLock,
    NoLocksError,
    knows_locks,
    try_lock,
    try_lock_folder,
)
from megadlcm.run_folder import files
from megadlcm.run_folder.events import now

logger = logging.getLogger(__name__)

_MOST_CHARACTERS = 1 << 16
_LOOKS = 20
_PAUSE_SECONDS = 0.05
"""A holder has its lock a moment before it has said who it is, and a moment after it has ended."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder."""

    attempt: str
    """Told apart from every other start."""
    host: str
    pid: int
    process: str
    """What tells the process from a later one with its pid."""
    started: str
    """When it took the folder, in UTC."""

    @classmethod
    def of_this_process(cls) -> Owner:
        """This start, which begins to hold the folder now."""
        own = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), own, _identity(own), now())

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended: of another machine or container nothing is known."""
        if self.host != socket.gethostname():
            return False
        boot, namespace, _ = _identity(os.getpid()).split("/")
        # a machine that was started again has none of its processes
        if not self.process.startswith(f"{boot}/"):
            return True
        return self.process.startswith(f"{boot}/{namespace}/") and (
            self.process != _identity(self.pid)
        )

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.started}"


@contextlib.contextmanager
def holding(folder: Path, warn: Callable[[str], object] = logger.warning) -> Iterator[Owner]:
    """Holds a run folder for as long as the context is open; one process of a run does it for all.

    Args:
        folder: the run folder, which exists.
        warn: gets a line where a start on another machine has left the folder without a word.

    Yields:
        What is written down of this start.

    Raises:
        InputError: another start holds it.
    """
    path, own = folder / files.OWNER, Owner.of_this_process()
    # a pipe can be locked, but says of nobody who holds it
    if path.exists() and not path.is_file():
        raise InputError(
            f"output_dir = {path}: must be a file that can be written to (it is none); remove it, "
            "or choose another output_dir",
            key="output_dir",
        )
    with contextlib.ExitStack() as locks:
        try:
            with writing(path):
                # always in this order: two starts that hold one each would refuse each other
                locks.enter_context(_lock_folder(path) or contextlib.nullcontext())
                locks.enter_context(_take(path, own, warn) or contextlib.nullcontext())
        except OSError as error:
            raise InputError(
                f"output_dir = {folder}: {path} cannot be written ({error.strerror or error}); "
                "remove it, or choose another output_dir",
                key="output_dir",
            ) from error
        try:
            yield own
        finally:
            # before the lock goes: whoever is waiting for it finds that the file is another one
            if read_owner(path) == own:
                with contextlib.suppress(OSError):
                    path.unlink()


def read_owner(path: Path) -> Owner | None:
    """Reads who holds a run folder; None where nobody does, or has not said so yet."""
    try:
        with os.fdopen(open_ordinary(path), encoding="utf-8") as file:
            values = json.loads(file.read(_MOST_CHARACTERS))
        # a later version may say more
        texts: dict[str, Any] = {key: str(values[key]) for key in Owner.__dataclass_fields__}
        return Owner(**texts | {"pid": int(values["pid"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_owner(folder: Path, attempt: str) -> None:
    """Refuses to go on where another start has taken the run folder over.

    Args:
        folder: the run folder.
        attempt: the start that asks.

    Raises:
        StorageError: another one has, which may have been told that this one is dead.
    """
    owner = read_owner(folder / files.OWNER)
    if owner is not None and owner.attempt != attempt:
        raise StorageError(
            f"output_dir = {folder}: another start of the run has taken it over ({owner}); this "
            "one publishes nothing more"
        )


def _lock_folder(path: Path) -> FileLock | None:
    """Locks the folder of the file; returns None where its file system locks no folders."""
    found = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_SECONDS)
        try:
            lock = try_lock_folder(path.parent)
        except (NoLocksError, OSError):
            return None
        if lock is not None:
            return lock
        found = read_owner(path)
        if found is not None and not found.is_dead:
            break
    raise _refusal(path, found)


def _take(path: Path, own: Owner, warn: Callable[[str], object]) -> FileLock | None:
    """Makes this process the holder; returns its lock, None where the file alone is the lock."""
    # asked before there is a file: one that nobody has signed would hold the folder
    if not knows_locks(path.parent):
        _claim(path, own)
        return None
    found = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_SECONDS)
        lock = try_lock(path)
        if lock is not None:
            try:
                _warn_of_other_machine(path, warn)
                _sign(lock.descriptor, path, own)
            except BaseException:
                lock.close()
                raise
            return lock
        found = read_owner(path)
        # a dead one's name still stands there where another start has just taken over
        if found is not None and not found.is_dead:
            break
    raise _refusal(path, found)


def _warn_of_other_machine(path: Path, warn: Callable[[str], object]) -> None:
    """Says whose locked file this was, if a lock that holds on one machine would not tell."""
    left = read_owner(path)
    if left is not None and left.host != socket.gethostname():
        warn(
            f"output_dir = {path.parent}: its last start ({left}) did not end in order; make sure "
            "that it has ended: some file systems keep locks on one machine only"
        )


def _claim(path: Path, own: Owner) -> None:
    """Makes the file, which only one start can, also in the place of a dead holder's.

    Raises:
        InputError: a process that may live has it, or is about to take it from a dead one.
    """
    found = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_SECONDS)
        with contextlib.suppress(FileExistsError):
            _create(path, own)
            return
        found = read_owner(path)
        if found is None:
            continue  # its holder has just ended, or is about to sign it
        if not found.is_dead:
            break
        # who has this name may replace the file of that dead holder, and nobody else
        right = path.with_name(f"{path.name}.after-{found.attempt}")
        _claim(right, own)
        try:
            # another start may have done so, and given the name of its right back
            if read_owner(path) == found:
                write_durably(path, _encode(own))
                return
        finally:
            right.unlink(missing_ok=True)
    raise _refusal(path, found, f"; if that process is gone, remove {path}")


def _create(path: Path, own: Owner) -> None:
    """Makes a file that is not there, and signs it."""
    # no link to a whole file: there are file systems without links, too
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _sign(descriptor, path, own)
    finally:
        os.close(descriptor)


def _sign(descriptor: int, path: Path, own: Owner) -> None:
    """Writes into an open file who holds it; removes the file where that fails."""
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, _encode(own), 0)
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _refusal(path: Path, found: Owner | None, more: str = "") -> InputError:
    who = found or "it has not said which process"
    return InputError(
        f"output_dir = {path.parent}: another start of the run is using it ({who}); wait until it "
        f"ends, or choose another output_dir{more}",
        key="output_dir",
    )


def _encode(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner)) + "\n").encode()


def _identity(pid: int) -> str:
    """What tells a process from another one with its pid: boot, namespace of pids, start."""
    boot = namespace = started = ""
    with contextlib.suppress(OSError):  # a system without /proc, or no such process
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # the name, in brackets, may hold blanks; field 22 is the start in ticks since the boot
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{boot}/{namespace}/{started}"
