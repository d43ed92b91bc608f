"""Tables for people: columns as wide as what is in them, never wrapped and never cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import JustifyMethod

_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that a terminal obeys or does not show, joiners and marks included."""
_GAP = 2
"""Spaces between columns."""


def render_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Returns rows below their header, in columns.

    Args:
        header: a heading for each column; empty for rows that stand alone.
        rows: a cell for each column; control characters in them are shown and not obeyed.
        left: numbers of the columns that begin at their left edge; the others end at their right.
    """
    # rich is loaded here: a command that prints no table would pay a third of its start-up for it.
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [header, *rows] if header else rows
    columns = [[printable(cell) for cell in column] for column in zip(*lines, strict=True)]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=False)
    for number in range(len(columns)):
        justify: JustifyMethod = "left" if number in left else "right"
        table.add_column(justify=justify, no_wrap=True)
    # One row of tall cells: a row for each line takes rich four times as long. And Text, not str:
    # a name such as "[bold]" or ":warning:" is no markup.
    table.add_row(*(Text("\n".join(column)) for column in columns))
    # rich shrinks columns to the width of its console, so it gets one that they cannot exceed.
    width = sum(max(map(cell_len, column)) + _GAP for column in columns)
    out = StringIO()
    Console(file=out, width=max(width, 1), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def printable(text: str, kept: str = "") -> str:
    """Returns a text in which what a terminal would obey is spelt out as Python does.

    Args:
        text: from anywhere.
        kept: control characters that may stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode("ascii")
        if unicodedata.category(each) in _UNSEEN and each not in kept
        else each
        for each in text
    )
