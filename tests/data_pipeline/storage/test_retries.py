"""Reads that fail for a while, and those that no other attempt can change."""

from __future__ import annotations

import errno
import time

import pytest

from data_pipeline.errors import DamagedDataError, InputError, StorageError
from data_pipeline.storage.interface import StorageOptions
from data_pipeline.storage.retries import LONGEST_WAIT_SECONDS, with_retries

OPTIONS = StorageOptions(attempts=3, wait_seconds=0.0)


class Failing:
    """Raises its failures in turn, then returns 7; counts its calls."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return 7


def io_error() -> OSError:
    return OSError(errno.EIO, "no answer")


def test_a_failure_that_passes_costs_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    read = Failing(*[io_error() for _ in range(9)])
    assert with_retries(read, "shard", StorageOptions(attempts=10, wait_seconds=0.5)) == 7
    assert pauses == [0.5, 1, 2, 4, 8, 16, *[LONGEST_WAIT_SECONDS] * 3]


def test_a_failure_that_stays_is_named_with_file_attempts_and_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = Failing(*[io_error() for _ in range(9)])
    with pytest.raises(StorageError, match=r"^shard-7: cannot be read after 3 attempts .*no ans"):
        with_retries(read, "shard-7", OPTIONS)
    assert read.calls == 3
    assert [record.args[:2] for record in caplog.records] == [("shard-7", 1), ("shard-7", 2)]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (FileNotFoundError(), FileNotFoundError),
        (NotADirectoryError(), NotADirectoryError),
        (IsADirectoryError(), IsADirectoryError),
        (PermissionError(), InputError),
        (DamagedDataError("wrong"), DamagedDataError),
        (StorageError("full"), StorageError),
        (ValueError("not a failure of storage"), ValueError),
    ],
)
@pytest.mark.parametrize("all_pass", [False, True])
def test_what_another_attempt_cannot_change_is_said_at_once(
    failure: Exception, expected: type[Exception], all_pass: bool
) -> None:
    read = Failing(failure)
    kinds = (Exception,) if all_pass else (OSError,)
    if all_pass and expected is ValueError:
        assert with_retries(read, "shard", OPTIONS, kinds) == 7
        return
    with pytest.raises(expected):
        with_retries(read, "shard", OPTIONS, kinds)
    assert read.calls == 1


def test_a_message_has_one_line() -> None:
    read = Failing(*[OSError("two\nlines") for _ in range(3)])
    with pytest.raises(StorageError) as caught:
        with_retries(read, "shard", OPTIONS)
    assert "two lines" in str(caught.value) and "\n" not in str(caught.value)
