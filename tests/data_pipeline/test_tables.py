"""Tables: every cell is there as it is, in one line, under its heading."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_pipeline.tables import printable, render_table
from tests.support.paths import ROOT


def test_the_first_column_begins_left_and_the_others_end_right() -> None:
    table = render_table(("name", "n", "share"), [("a", "1,000", "2%"), ("longer", "3", "100%")])
    assert table.splitlines() == [
        "name        n  share",
        "a       1,000     2%",
        "longer      3   100%",
    ]


def test_columns_may_begin_left_and_rows_may_stand_alone() -> None:
    assert render_table((), [("a", "one"), ("bcd", "three")], left=(0, 1)) == "a    one\nbcd  three"
    assert render_table(("only", "a header"), []) == "only  a header"


def test_nothing_is_wrapped_or_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = "word " * 200 + "end"
    lines = render_table(("one", "two"), [(long, "x" * 500), ("", "y")]).splitlines()
    assert len(lines) == 3
    assert lines[1] == f"{long}  {'x' * 500}"
    assert lines[2] == "y".rjust(len(lines[1]))


def test_markup_is_text_and_colours_stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = render_table(("path",), [("[bold]x[/bold]",), (":warning: 1 'a' http://b.c",)])
    assert table.splitlines()[1:] == ["[bold]x[/bold]", ":warning: 1 'a' http://b.c"]


def test_wide_characters_take_two_columns() -> None:
    table = render_table(("domain", "n"), [("\u5929\u5730\u7384\u9ec4", "1"), ("en", "2")])
    assert table.splitlines() == [
        "domain    n",
        "\u5929\u5730\u7384\u9ec4  1",
        "en        2",
    ]


def test_a_name_cannot_forge_a_row() -> None:
    """Domains come from the input texts."""
    table = render_table(("domain", "tokens"), [("en\nall  999\x1b[2J", "1"), ("\u202exy", "2")])
    assert len(table.splitlines()) == 3
    assert "\x1b" not in table and "\u202e" not in table
    assert printable("a\tb\nc\u2028", "\n\t") == "a\tb\nc\\u2028"
    plain = "\u5929\u5730 K\u00f6nig \U0001f600"
    assert printable(plain) == plain


def test_a_row_with_a_cell_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        render_table(("a", "b"), [("1",)])


def test_who_imports_it_loads_no_rich() -> None:
    """The start of a command that prints no table is measured in tenths of a second."""
    program = "import sys, data_pipeline.tables; sys.exit('rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
