"""A plan is what shapes the result, and says in words how another one differs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.prepare.encode import DocumentRules
from data_pipeline.prepare.formats.format import InputFile
from data_pipeline.prepare.plan import Plan


def make_plan(*sizes: int, part_bytes: int = 100) -> Plan:
    """A plan for files of those sizes."""
    files = tuple(InputFile(Path(f"/x/{n}"), f"{n}.txt", size) for n, size in enumerate(sizes))
    return Plan(files, "0" * 64, 1000, part_bytes, False, DocumentRules())


@given(sizes=st.lists(st.integers(0, 300), max_size=20), part_bytes=st.integers(1, 400))
def test_parts_hold_every_file_once_and_end_when_they_are_large_enough(
    sizes: list[int], part_bytes: int
) -> None:
    """Each but the last reaches the size, and did not before its last file."""
    plan = make_plan(*sizes, part_bytes=part_bytes)
    assert [file for part in plan.parts for file in part] == list(plan.files)
    for number, part in enumerate(plan.parts):
        size = sum(file.num_bytes for file in part)
        assert part and size - part[-1].num_bytes < part_bytes
        assert size >= part_bytes or number == len(plan.parts) - 1


def test_where_the_files_lie_is_no_part_of_the_plan() -> None:
    """A corpus may be mounted elsewhere on another machine."""
    plan = make_plan(5, 6)
    moved = replace(plan, files=tuple(replace(f, path=Path("/y") / f.path) for f in plan.files))
    assert moved.sha256 == plan.sha256 and plan.difference(moved.contents) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 10}, "--shard-tokens was 10, is 1000"),
        ({"deduplicate": True}, "--deduplicate was True, is False"),
        ({"tokenizer_sha256": "1" * 64}, f"--tokenizer was {'1' * 64}, is {'0' * 64}"),
        ({"rules": DocumentRules(max_tokens=9)}, "--max-tokens was 9, is None"),
        ({"rules": DocumentRules(domain="web")}, "--domain was web, is None"),
        ({"files": make_plan(5, 1006).files}, "input 1.txt had 1,006 bytes, has 6"),
        ({"files": make_plan(5, 6, 7).files}, "3 input files, now 2"),
        ({"files": make_plan(5, 6).files[1:]}, "input 0.txt where 1.txt was"),
        ({"left_out": Counter({"symbolic links": 1})}, "what was left out"),
    ],
)
def test_what_differs_is_said(change: dict[str, object], message: str) -> None:
    """The first thing, as the user gave it."""
    plan = make_plan(5, 6)
    other = replace(plan, **change)
    assert other.sha256 != plan.sha256
    assert plan.difference(other.contents) == message


def test_a_plan_that_cannot_be_read_differs() -> None:
    """Damaged, of another program, of another version."""
    plan = make_plan(5)
    later = json.dumps({**json.loads(plan.contents), "version": 99}).encode()
    assert plan.difference(later) == "plan version 99, this program has 1"
    for contents in (b"", b"{}", b"[]", b"\xff", plan.contents[:-9]):
        assert plan.difference(contents) == "a plan that cannot be read"
