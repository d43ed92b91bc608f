"""One start at a time holds a run folder; a dead one holds nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, StorageError
from megadlcm.run_folder import owner
from megadlcm.run_folder.owner import Owner, holding, read_owner
from tests.support.paths import ROOT

_HOLD = """
import sys, time
from pathlib import Path
from megadlcm.run_folder.owner import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def looks_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "_PAUSE_SECONDS", 1e-3)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows neither locks nor links."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("os.link", refuse)


def write_owner(folder: Path, **changes: object) -> Owner:
    """Leaves behind what a start that ended without a word leaves."""
    left = dataclasses.replace(Owner.of_this_process(), **changes)
    (folder / "owner.json").write_text(json.dumps(dataclasses.asdict(left)))
    return left


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused, holding(folder):
        pass
    assert refused.value.key == "output_dir"
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_start_is_told_who_holds_the_folder(
    tmp_path: Path, locks: bool, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")
    with holding(tmp_path) as own:
        line = refusal(tmp_path)
        assert f"output_dir = {tmp_path}: another start of the run is using it" in line
        who = f"host {socket.gethostname()}, pid {os.getpid()}, since {own.started}"
        assert who in line and "wait until it ends" in line
        assert read_owner(tmp_path / "owner.json") == own
    assert list(tmp_path.iterdir()) == []
    with holding(tmp_path) as later:
        assert later.attempt != own.attempt


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            assert f"pid {process.pid}," in refusal(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
    left = read_owner(tmp_path / "owner.json")
    assert left is not None and left.is_dead
    with holding(tmp_path) as own:
        assert read_owner(tmp_path / "owner.json") == own
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_is_gone_holds_nothing_where_there_are_locks(tmp_path: Path) -> None:
    """Its lock is gone with it, whatever its file says."""
    left = write_owner(tmp_path, host="elsewhere", attempt="other")
    assert not left.is_dead
    with holding(tmp_path) as own:
        assert read_owner(tmp_path / "owner.json") == own


def test_of_a_start_on_another_machine_a_line_tells_which_a_local_lock_would_not(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    left = write_owner(tmp_path, host="elsewhere", attempt="other")
    with holding(tmp_path, told.append):
        pass
    assert len(told) == 1 and "\n" not in told[0]
    who = f"host elsewhere, pid {os.getpid()}, since {left.started}"
    assert f"output_dir = {tmp_path}: its last start ({who}) did not end in order" in told[0]
    # what this machine knows needs no word: nobody, a dead start, a file without a name
    for content in (None, "dead", ""):
        if content == "dead":
            write_owner(tmp_path, attempt="other", process="of a boot before")
        elif content is not None:
            (tmp_path / "owner.json").write_text(content)
        with holding(tmp_path, told.append):
            pass
    assert len(told) == 1


@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_unsigned_file_is_a_holder_until_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / "owner.json").touch()
    line = refusal(tmp_path)
    assert "it has not said which process" in line
    assert f"if that process is gone, remove {tmp_path / 'owner.json'}" in line
    (tmp_path / "owner.json").unlink()
    with holding(tmp_path) as own:
        assert read_owner(tmp_path / "owner.json") == own


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO, errno.EINVAL])
@pytest.mark.parametrize(
    ("failing", "locks"), [("fcntl.flock", True), ("os.fsync", True), ("os.fsync", False)]
)
def test_a_failure_is_one_line_and_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    number: int,
    locks: bool,
    request: pytest.FixtureRequest,
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(failing, fail)
    said = rf"owner.json:? cannot be written \({os.strerror(number)}\)"
    with pytest.raises((InputError, StorageError), match=said), holding(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("process", [7, None, "", "a/b"])
def test_whatever_stands_in_the_file_is_no_failure(tmp_path: Path, process: object) -> None:
    with holding(tmp_path):
        write_owner(tmp_path, process=process)
        assert "another start" in refusal(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("found", ["nothing", "dead"])
def test_of_starts_in_the_same_instant_exactly_one_wins(
    tmp_path: Path, locks: bool, found: str, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")
    count = 6
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if found == "dead":
            write_owner(folder, process="of a boot before")
        begin, ended = threading.Barrier(count), threading.Barrier(count)
        outcomes: list[str] = []

        def start(
            folder: Path = folder,
            begin: threading.Barrier = begin,
            ended: threading.Barrier = ended,
            outcomes: list[str] = outcomes,
        ) -> None:
            with contextlib.ExitStack() as stack:
                begin.wait()
                try:
                    own = stack.enter_context(holding(folder))
                except InputError as refused:
                    outcomes.append(str(refused))
                else:
                    outcomes.append(own.attempt)
                ended.wait()  # nobody ends before all have tried

        threads = [threading.Thread(target=start) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [text for text in outcomes if len(text.split()) == 1]
        assert len(outcomes) == count and len(winners) == 1
        # of a winner that is slow to sign it is not said who it is
        assert all("another start" in text for text in outcomes if text not in winners)
        assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_holder_that_is_known_to_be_dead_is_followed(tmp_path: Path) -> None:
    boot, namespace, ticks = owner._identity(os.getpid()).split("/")
    for process in (f"another-boot/{namespace}/{ticks}", f"{boot}/{namespace}/{ticks}1"):
        assert write_owner(tmp_path, process=process, attempt="other").is_dead
        with holding(tmp_path) as own:
            assert read_owner(tmp_path / "owner.json") == own
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_that_died_while_it_followed_a_dead_one_is_followed(
    tmp_path: Path,
) -> None:
    write_owner(tmp_path, process="of a boot before", attempt="second")
    (tmp_path / "owner.json").rename(tmp_path / "owner.json.after-first")
    write_owner(tmp_path, process="of a boot before", attempt="first")
    with holding(tmp_path) as own:
        assert read_owner(tmp_path / "owner.json") == own
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_machine_may_be_alive(tmp_path: Path) -> None:
    boot, _, ticks = owner._identity(os.getpid()).split("/")
    # of another machine, and of another container of this one
    for left in ({"host": "elsewhere"}, {"process": f"{boot}/pid:[1]/{ticks}"}):
        write_owner(tmp_path, **left)
        line = refusal(tmp_path)
        assert f"if that process is gone, remove {tmp_path / 'owner.json'}" in line
        assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]


def test_a_holder_that_has_not_said_who_it_is_is_one_nevertheless(tmp_path: Path) -> None:
    with holding(tmp_path):
        (tmp_path / "owner.json").write_text("")
        assert "it has not said which process" in refusal(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_who_removes_the_file_of_a_holder_lets_nobody_in(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where files cannot be locked, as long as the folder can."""
    if not locks:
        monkeypatch.setattr(owner, "knows_locks", lambda _: False)
    with holding(tmp_path):
        for _ in range(2):  # the refused start left no file either
            (tmp_path / "owner.json").unlink(missing_ok=True)
            assert "it has not said which process" in refusal(tmp_path)
            assert list(tmp_path.iterdir()) == []
    with holding(tmp_path) as own:  # nothing else was wrong
        assert read_owner(tmp_path / "owner.json") == own


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK])
def test_where_folders_cannot_be_locked_the_file_alone_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    lock_file = fcntl.flock

    def flock(descriptor: int, kind: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        lock_file(descriptor, kind)

    monkeypatch.setattr("fcntl.flock", flock)
    with holding(tmp_path) as own:
        assert f"pid {own.pid}," in refusal(tmp_path)
    with holding(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_was_followed_takes_nothing_away(tmp_path: Path) -> None:
    with holding(tmp_path):
        later = write_owner(tmp_path, attempt="later")
    assert read_owner(tmp_path / "owner.json") == later


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "owner.json").mkdir()
    assert f"{tmp_path / 'owner.json'}: must be a file" in refusal(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_a_pipe_in_its_place_is_not_waited_for(
    tmp_path: Path, locks: bool, request: pytest.FixtureRequest
) -> None:
    if not locks:
        request.getfixturevalue("no_locks")
    os.mkfifo(tmp_path / "owner.json")
    assert read_owner(tmp_path / "owner.json") is None
    assert f"{tmp_path / 'owner.json'}: must be a file" in refusal(tmp_path)
    assert (tmp_path / "owner.json").is_fifo()
