"""What ends or accompanies the start of a run, on every process of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from data_pipeline.errors import InputError, StorageError
from megadlcm.config import RunConfig
from megadlcm.parallel.process_group import join_process_group
from megadlcm.run_folder.owner import Owner
from megadlcm.training import pretrain
from tests.support.distributed import run_distributed

MakeRun = Callable[..., RunConfig]


class _KeepsTheWriter(Exception):  # noqa: N818
    """One that cannot be sent to another process."""

    def __reduce__(self) -> str:
        raise TypeError("cannot pickle")


FAILURES = (
    InputError("refused", key="output_dir"),
    StorageError("full"),
    RuntimeError("first\nsecond"),
    OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP)),
    _KeepsTheWriter("kept"),
)


def hear(config: RunConfig) -> list[tuple[str, str]]:
    """What this process hears of each failure to take the folder, then of none."""
    mesh = join_process_group(config.parallel)
    told = []
    for failure in (*FAILURES, None):

        @contextlib.contextmanager
        def holding(*_: object, failure: Exception | None = failure) -> Iterator[Owner]:
            if failure is not None:
                raise failure
            yield Owner.of_this_process()

        with mock.patch.object(pretrain, "holding", holding):
            try:
                with pretrain._run_folder(config, mesh):
                    told.append(("", ""))
            except Exception as error:
                told.append((type(error).__name__, str(error)))
    return told


def test_whatever_keeps_the_writer_from_the_folder_is_told_to_all(make_run: MakeRun) -> None:
    config = make_run()
    writer, other = run_distributed(hear, 2, config)
    assert writer[:2] == other[:2] == [("InputError", "refused"), ("StorageError", "full")]
    assert [kind for kind, _ in writer[2:5]] == ["RuntimeError", "OSError", "_KeepsTheWriter"]
    start = f"output_dir = {config.output_dir}: rank 0 failed: "
    lines = [f"{start}first", f"{start}[Errno 95] Operation not supported", f"{start}kept"]
    assert other[2:5] == [("StorageError", line) for line in lines]
    assert writer[5] == other[5] == ("", "")


def test_a_folder_taken_over_from_another_machine_is_a_line_on_screen_and_in_the_log(
    make_run: MakeRun, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_run(training={"train_steps": 1}, logging={"tensorboard": False})
    folder = Path(config.output_dir)
    folder.mkdir()
    left = vars(Owner.of_this_process()) | {"host": "else\nwhere", "pid": 12}
    (folder / "owner.json").write_text(json.dumps(left))
    assert pretrain.run(config) == 0
    line = capfd.readouterr().err
    assert line.startswith(f"warning: output_dir = {folder}: its last start (host else\\nwhere, ")
    assert f"pid 12, since {left['started']}) did not end in order" in line
    assert line.count("\n") == 1
    log = (folder / "logs" / "rank_0000.log").read_text()
    assert log.count("WARNING megadlcm.training.pretrain: output_dir = ") == 1
    assert not (folder / "owner.json").exists()
