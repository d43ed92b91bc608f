"""Rows of metrics.jsonl: written once each, whole or cut off, and read in one way."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, StorageError
from megadlcm.run_folder import rows as rows_module
from megadlcm.run_folder.rows import Row, RowFile, evaluation_rows, read_rows, training_rows
from tests.support.full_disks import largest_file


def train_row(step: int, loss: float = 1.0) -> Row:
    return {"step": step, "loss": loss}


def write_rows(folder: Path, rows: list[Row], first_step: int = 1) -> None:
    """What a start from the step before `first_step` does."""
    with opened(folder, first_step) as file:
        for row in rows:
            file.append(row)


@contextlib.contextmanager
def opened(folder: Path, first_step: int = 1) -> Iterator[RowFile]:
    with contextlib.closing(RowFile(folder, first_step)) as file:
        yield file


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3, "loss": 1.0}'])
def test_a_torn_last_line_is_cut_off_and_its_step_written_again(
    tmp_path: Path, torn: bytes
) -> None:
    write_rows(tmp_path, [train_row(1), train_row(2)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    write_rows(tmp_path, [train_row(3)], first_step=3)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"loss": 1.0}', '{"step": "x"}'])
def test_a_line_that_is_no_row_is_named_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    contents = f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 3, "loss": 1.0}}\n'
    path.write_text(contents)
    with pytest.raises(InputError, match="line 2 is no row of metrics"):
        read_rows(path)
    assert path.read_text() == contents


def test_a_number_that_json_does_not_know_is_refused_and_not_written(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.append(train_row(1))
        with pytest.raises(ValueError, match="JSON"):
            file.append(train_row(2, math.nan))
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_rows_of_steps_and_of_evaluations_are_told_apart(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    rows = [train_row(1), {"step": 1, "eval_loss": 2.0}, train_row(2)]
    write_rows(tmp_path, rows)
    write_rows(tmp_path, rows)  # a replay
    assert read_rows(tmp_path) == read_rows(tmp_path / "metrics.jsonl") == rows
    assert training_rows(rows) == [rows[0], rows[2]] and evaluation_rows(rows) == [rows[1]]


MEASURED = {"tokens_per_second": 5.0, "restart_count": 1}
EARLIER = [train_row(1), train_row(2), train_row(3), {"step": 3, "eval_loss": 2.0}, train_row(4)]


def steps(rows: list[Row]) -> list[tuple[Any, Any]]:
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def abandoned(folder: Path) -> list[Row]:
    """Rows that were set aside, without the time."""
    rows = read_rows(folder / "metrics.abandoned.jsonl")
    assert all(row.pop("set_aside") for row in rows)
    return rows


def events(folder: Path) -> list[Row]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_replay_keeps_the_file_as_it_was(tmp_path: Path) -> None:
    """Whatever was measured anew: the rows that were written first stay."""
    write_rows(tmp_path, EARLIER)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write_rows(tmp_path, [row | MEASURED for row in EARLIER[1:]], first_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    write_rows(tmp_path, [train_row(4), train_row(5)], first_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    "branch",
    [
        [train_row(2), train_row(3, 9.0)],  # another number
        [train_row(2), train_row(3) | {"batch_digest": "ab"}],  # other data
        [train_row(2), {"step": 2, "eval_loss": 2.0}],  # an evaluation that there was not
        [train_row(2), train_row(4)],  # rows further apart
    ],
)
def test_another_branch_sets_the_rest_of_the_earlier_one_aside(
    tmp_path: Path, branch: list[Row]
) -> None:
    write_rows(tmp_path, EARLIER)
    write_rows(tmp_path, [row | MEASURED for row in branch], first_step=2)
    # step 2 is the same on both branches
    assert read_rows(tmp_path) == [*EARLIER[:2], branch[1] | MEASURED]
    assert abandoned(tmp_path) == EARLIER[2:]
    (event,) = events(tmp_path)
    assert event.pop("time").endswith("+00:00")
    assert event == {
        "event": "rows set aside",
        "first_step": 3,
        "last_step": 4,
        "rows": 3,
        "file": "metrics.abandoned.jsonl",
        "restart_count": 1,
    }


def test_each_branch_that_was_left_is_kept(tmp_path: Path) -> None:
    write_rows(tmp_path, EARLIER)
    write_rows(tmp_path, [train_row(3, 7.0), train_row(4, 7.0)], first_step=3)
    write_rows(tmp_path, [train_row(3, 8.0)], first_step=3)
    assert steps(read_rows(tmp_path)) == [(1, 1.0), (2, 1.0), (3, 8.0)]
    assert abandoned(tmp_path) == [*EARLIER[2:], train_row(3, 7.0), train_row(4, 7.0)]
    assert len(events(tmp_path)) == 2


@pytest.mark.parametrize("kill_at", ["append_lines", "append_event", "truncate", "torn copy"])
def test_a_kill_while_rows_are_set_aside_loses_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: str
) -> None:
    class KilledError(Exception):
        pass

    def die(*_: object, **__: object) -> None:
        if kill_at == "torn copy":
            (tmp_path / "metrics.abandoned.jsonl").write_text(
                json.dumps(EARLIER[2] | {"set_aside": "then"}) + '\n{"step": 3, "ev'
            )
        raise KilledError

    write_rows(tmp_path, EARLIER)
    branch = [train_row(3, 7.0), train_row(4, 7.0)]
    with monkeypatch.context() as patch:
        if kill_at == "truncate":
            patch.setattr("megadlcm.run_folder.rows.os.truncate", die)
        else:
            patch.setattr(rows_module, kill_at.replace("torn copy", "append_lines"), die)
        with pytest.raises(KilledError):
            write_rows(tmp_path, branch, first_step=3)
    assert read_rows(tmp_path) == EARLIER  # nothing is cut before it is safe
    write_rows(tmp_path, branch, first_step=3)
    assert read_rows(tmp_path) == [*EARLIER[:2], *branch]
    assert abandoned(tmp_path) == EARLIER[2:]


def test_who_has_the_file_open_goes_on_reading_it(tmp_path: Path) -> None:
    write_rows(tmp_path, EARLIER)
    path = tmp_path / "metrics.jsonl"
    with path.open() as reader:
        reader.read()
        write_rows(tmp_path, [train_row(3, 7.0)], first_step=3)
        reader.seek(0)
        assert reader.read() == path.read_text()
        assert os.fstat(reader.fileno()).st_ino == path.stat().st_ino
        write_rows(tmp_path, [train_row(4, 7.0)], first_step=4)
        assert reader.read() == json.dumps(train_row(4, 7.0)) + "\n"


def test_a_row_that_the_disk_does_not_take_is_one_line_and_the_rows_before_it_stay(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(
            StorageError, match=r"metrics.jsonl: cannot be written \(File too large"
        ) as e,
        opened(tmp_path) as file,
        largest_file(40),
    ):
        file.append(train_row(1))
        file.append(train_row(2))
    assert re.search(r"; 25 bytes needed, [\d,]+ bytes free in ", str(e.value))
    assert "\n" not in str(e.value)
    write_rows(tmp_path, [train_row(2)], first_step=2)
    assert read_rows(tmp_path) == [train_row(1), train_row(2)]
