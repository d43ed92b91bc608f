"""Which start of a run may write to its folder: one, until it ends or is killed.

`owner.json` says who holds the folder, and is locked meanwhile: the system takes the lock of a
killed process back, on NFS that of a machine that is gone as well, once the server notices. So a
file that nobody has locked is a dead holder's, and is taken over. Where the file system knows no
locks, the file itself is the lock: only one start can make it, and it is taken over where its
holder is known to be dead, which can be seen on the holder's machine alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.output_folder import writing
from data_pipeline.storage.locks import FileLock, NoLocksError, try_lock
from megadlcm.run_folder import files
from megadlcm.run_folder.events import now

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
def holding(folder: Path) -> Iterator[Owner]:
    """Holds a run folder for as long as the context is open; one process of a run does it for all.

    Args:
        folder: the run folder, which exists.

    Yields:
        What is written down of this start.

    Raises:
        InputError: another start holds it.
    """
    path, own = folder / files.OWNER, Owner.of_this_process()
    try:
        with writing(path):
            lock = _take(path, own)
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"output_dir = {folder}: {path} cannot be written ({error.strerror}); remove it, or "
            "choose another output_dir",
            key="output_dir",
        ) from error
    try:
        yield own
    finally:
        # before the lock goes: whoever is waiting for it finds that the file is another one
        if read_owner(path) == own:
            with contextlib.suppress(OSError):
                path.unlink()
        if lock is not None:
            lock.close()


def read_owner(path: Path) -> Owner | None:
    """Reads who holds a run folder; None where nobody does, or has not said so yet."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # a later version may say more
        return Owner(**{key: values[key] for key in Owner.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _take(path: Path, own: Owner) -> FileLock | None:
    """Makes this process the holder; returns its lock, None where the file alone is the lock."""
    found = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_SECONDS)
        try:
            lock = try_lock(path)
        except NoLocksError:
            _take_name(path, own)
            return None
        if lock is not None:
            _sign(lock, path, own)
            return lock
        found = read_owner(path)
        # a dead one's name still stands there where another start has just taken over
        if found is not None and not found.is_dead:
            break
    raise _refusal(path, found)


def _sign(lock: FileLock, path: Path, own: Owner) -> None:
    """Writes who holds the lock of a file into it."""
    try:
        os.truncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, _encode(own), 0)
        os.fsync(lock.descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        lock.close()
        raise


def _take_name(path: Path, own: Owner) -> None:
    """Makes the file, which only one start can, also in the place of a dead holder's."""
    mine = path.with_name(f"{path.name}.{own.attempt}")
    try:
        mine.write_bytes(_encode(own))
        _claim(path, mine)
    finally:
        mine.unlink(missing_ok=True)


def _claim(path: Path, mine: Path) -> None:
    """Gives the file of this start another name, unless a process that lives has it.

    Raises:
        InputError: a process that may live has it, or is about to take it from a dead one.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            # whole before it has the name; a link is made by one alone, on NFS too
            os.link(mine, path)
            return
        found = read_owner(path)
        if found is None and not path.exists():
            continue  # its holder has just ended
        if found is not None and not found.is_dead:
            raise _refusal(path, found, f"; if that process is gone, remove {path}")
        # who has this name may replace the file of that dead holder, and nobody else
        right = path.with_name(f"{path.name}.after-{found.attempt if found else 'unknown'}")
        _claim(right, mine)
        try:
            # another start may have done so, and given the name of its right back
            if path.exists() and read_owner(path) == found:
                new = mine.with_name(f"{mine.name}.new")
                os.link(mine, new)
                os.replace(new, path)
                return
        finally:
            right.unlink(missing_ok=True)


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
