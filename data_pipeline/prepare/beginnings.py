"""How a file of a directory begins: records, whatever its name says, are no source code."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.prepare.formats.fields import BOM
from data_pipeline.small_file import open_ordinary

SEEN_BYTES = 1 << 16
"""How much of a file is looked at."""
LINES = "lines"
"""An object with a `text` on each line."""
UNNAMED = "unnamed"
"""The same, but the text is called otherwise."""
LISTED = "listed"
"""One list of such objects, or an object that holds one."""
TABLE = "table"
"""Columns with a name each, one of which is that of texts."""
_OTHER_NAMES = ("content", "raw_content")
"""What published corpora call the text."""
_TEXT_FIELD = re.compile(r'"text"\s*:\s*(?:"|null)')
_STRING = r'"(?:[^"\\]|\\.)*+"'
# an object whose first list stands behind nothing but strings, numbers and the like
_HOLDS_LIST = re.compile(
    rf"\{{\s*(?:{_STRING}\s*:\s*(?:{_STRING}|[\w.+-]+)\s*,\s*)*+{_STRING}\s*:\s*(?=\[)"
)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def records_in(path: Path, suffix: str) -> str:
    """Returns in which of the ways above a file holds records; empty where it holds none.

    Args:
        path: the file.
        suffix: what its name would end in if it were not kept under another.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with os.fdopen(open_ordinary(path), "rb") as file:
            head = file.read(SEEN_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    begun = head.removeprefix(BOM).decode("utf-8", "replace").lstrip()
    separator = _SEPARATORS.get(suffix.lower())
    if separator:
        return TABLE if _names_texts(begun, separator) else ""
    is_cut = len(head) == SEEN_BYTES
    if begun.startswith("["):
        return LISTED if _first_object(begun[1:].lstrip(), is_cut) == "text" else ""
    # outside of a list an object on many lines is a file of its own
    line, _, behind = begun.partition("\n")
    name = _first_object(line, is_cut=False)
    if name == "text":
        return LINES
    # many a program keeps one such object in a file
    if name and behind.lstrip().startswith("{"):
        return UNNAMED
    held = _HOLDS_LIST.match(begun)
    if held and _first_object(begun[held.end() + 1 :].lstrip(), is_cut) == "text":
        return LISTED
    return LINES if _first_object(line, is_cut) == "text" else ""


def _first_object(begun: str, is_cut: bool) -> str:
    """Returns what the text of the object is called that stands there; empty where it has none."""
    if not begun.startswith("{"):
        return ""
    try:
        first: dict[str, Any]
        first, _ = json.JSONDecoder().raw_decode(begun)
    except (ValueError, RecursionError):
        # longer than what is seen, a first object is known by its field alone
        return "text" if is_cut and _TEXT_FIELD.search(begun) else ""
    if "text" in first:
        return "text" if first["text"] is None or isinstance(first["text"], str) else ""
    return next((name for name in _OTHER_NAMES if isinstance(first.get(name), str)), "")


def _names_texts(begun: str, separator: str) -> bool:
    names = begun.partition("\n")[0].split(separator)
    return any(name.strip().strip("\"'").lower() in ("text", *_OTHER_NAMES) for name in names)
