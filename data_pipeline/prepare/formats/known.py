"""The table of formats: one row each, its functions in a file of its own."""

from __future__ import annotations

from data_pipeline.prepare.compression import compressed
from data_pipeline.prepare.formats.format import Format, InputFile
from data_pipeline.prepare.formats.lines import cut_lines, line_documents
from data_pipeline.prepare.formats.parquet import cut_rows, row_documents
from data_pipeline.prepare.formats.text import (
    cut_text,
    cut_tree_file,
    text_document,
    tree_document,
)

TREE = Format((), cut_tree_file, tree_document, domain="code")
"""Any file below a directory."""

FORMATS = (
    Format(compressed(".txt"), cut_text, text_document),
    Format(
        compressed(".jsonl", ".json", ".ndjson", ".jsonlines"),
        cut_lines,
        line_documents,
        holds_records=True,
    ),
    Format((".parquet",), cut_rows, row_documents, holds_records=True),
)
ENDINGS = tuple(ending for each in FORMATS for ending in each.endings)


def format_named(name: str) -> Format | None:
    """Returns the format of files that are called so, None where there is none."""
    # No ending is that of two formats, so that the order of the rows decides nothing.
    return next((each for each in FORMATS if name.lower().endswith(each.endings)), None)


def ending_of(name: str) -> str:
    """Returns which of ENDINGS a file name has, in its own letters; empty where it has none."""
    found = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[len(name) - len(found) :]


def format_of(file: InputFile) -> Format:
    """Returns the format of an input file: below a directory every file is one of a source tree."""
    found = TREE if file.tree else format_named(file.path.name)
    if found is None:
        raise AssertionError(f"{file.path}: found as an input, and of no format")
    return found
