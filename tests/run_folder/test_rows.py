"""Rows of metrics.jsonl: written once each, whole or cut off, and read in one way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from megadlcm.run_folder.rows import Row, RowFile, evaluation_rows, read_rows, training_rows


def train_row(step: int, loss: float = 1.0) -> Row:
    return {"step": step, "loss": loss}


def write_rows(folder: Path, rows: list[Row]) -> None:
    with opened(folder) as file:
        for row in rows:
            file.append(row)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[RowFile]:
    with contextlib.closing(RowFile(folder)) as file:
        yield file


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3, "loss": 1.0}'])
def test_a_torn_last_line_is_cut_off_and_its_step_written_again(
    tmp_path: Path, torn: bytes
) -> None:
    write_rows(tmp_path, [train_row(1), train_row(2)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    write_rows(tmp_path, [train_row(3)])
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
