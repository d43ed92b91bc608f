"""The input files of --input patterns, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.prepare.beginnings import LISTED, TABLE, UNNAMED, records_in
from data_pipeline.prepare.compression import COMPRESSIONS, UNREAD_COMPRESSIONS
from data_pipeline.prepare.formats.format import InputFile
from data_pipeline.prepare.formats.known import ENDINGS, ending_of, format_named

LINKS = "symbolic links"
_ROTATED = re.compile(r"(?:[.-]\d+|\.(?:bak|old|orig|part|tmp)|~)+$", re.IGNORECASE)


def find_inputs(patterns: Sequence[str], left_out: Counter[str]) -> list[InputFile]:
    """Returns the files of all --input patterns: patterns in their order, paths sorted in each.

    Args:
        patterns: file names, globs (`**` descends) or directories (source trees).
        left_out: told of the links that are left out.

    Raises:
        InputError: nothing matches, an unknown ending, or a file that two patterns match.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        found += _matches(pattern, left_out)
    seen: set[str] = set()
    for file in found:
        # Two names of one file, through links or patterns, would be trained twice.
        real = os.path.realpath(file.path)
        if real in seen:
            raise InputError(
                f"--input: {file.path} is matched twice, every document may enter once; "
                "narrow one of the patterns",
                key="--input",
            )
        seen.add(real)
    return found


def _matches(pattern: str, left_out: Counter[str]) -> Iterator[InputFile]:
    # A name that exists is taken as it is, brackets and all.
    literal = os.path.exists(pattern)
    base = os.path.dirname(pattern) or "." if literal else _fixed_part(pattern)
    matches = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise InputError(
            f"--input {pattern}: matches no file or directory; check the pattern", key="--input"
        )
    for match in matches:
        path = Path(match)
        if path.is_dir():
            if "**" not in pattern:  # `**` also yields the folders of the files it matches
                yield from _tree_files(path, left_out)
        elif ending_of(path.name):
            relative = os.path.relpath(path, base).replace(os.sep, "/")
            yield InputFile(path, relative, _size(path))
        else:
            raise InputError(
                f"--input {pattern}: {path} ends in none of {', '.join(ENDINGS)}; convert or "
                "rename it, or, if it is source code, name the directory itself to read every file "
                "as it stands",
                key="--input",
            )


def _fixed_part(pattern: str) -> str:
    """Returns the directory before the first wildcard."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return fixed or "."


def _size(path: Path) -> int:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # a pipe would be waited for, a device read without an end
            raise InputError(
                f"{path}: is no ordinary file (a pipe or a device); write its contents to a file",
                key="--input",
            )
        return found.st_size
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check the file", key="--input"
        ) from error


def _tree_files(root: Path, left_out: Counter[str]) -> list[InputFile]:
    """Returns every file below a directory but hidden ones, byte code and links, sorted by path.

    What a link leads to is a file of the tree already, or none of it.
    """
    relative: list[str] = []
    for folder, folders, all_names in os.walk(root):  # enters no link
        # In place: what is taken out here os.walk does not enter.
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        names = [name for name in all_names if name[0] != "."]
        below = os.path.relpath(folder, root)
        relative += [os.path.normpath(os.path.join(below, name)) for name in names]
        linked = sum(os.path.islink(os.path.join(folder, name)) for name in (*folders, *names))
        if linked:
            left_out[LINKS] += linked
    paths = [(name, root / name) for name in sorted(relative)]
    regular = [name for name, path in paths if path.is_file() and not path.is_symlink()]
    for name in regular:
        _check_tree_file(root, name)
    if not regular:
        raise InputError(
            f"--input {root}: no files in this directory; check the path", key="--input"
        )
    name = root.resolve().name
    return [
        InputFile(root / path, f"{name}/{path}".replace(os.sep, "/"), _size(root / path), name)
        for path in regular
    ]


def _check_tree_file(root: Path, name: str) -> None:
    """Raises InputError where a file holds records: it would become one text, JSON and all."""
    way_out = _way_to_read(root, name)
    if way_out:
        raise InputError(
            f"--input {root}: a directory is read as a source tree, but it holds {name}; {way_out} "
            "to read its documents, or take it out of the directory",
            key="--input",
        )


def _way_to_read(root: Path, name: str) -> str:
    """Returns how to read the records of a file of a directory; empty where it holds none."""
    pattern = f"--input '{root}/{'**/' if os.sep in name else ''}*"
    whole = _ROTATED.sub("", name)  # where a program keeps old files, as log rotation does
    stem, suffix = os.path.splitext(whole)
    ending = ending_of(whole)
    way_out = f"write {pattern}{ending}'"
    if suffix.lower() in UNREAD_COMPRESSIONS and ending_of(stem):
        return f"compress it with gzip or zstd instead of {suffix}"
    if suffix.lower() in ("", ".json", ".csv", ".tsv"):  # in many a source tree, too
        found = records_in(root / name, suffix)
        if found in (LISTED, TABLE):
            return "convert it to .jsonl, an object with a `text` on a line each,"
        if found == UNNAMED:
            return "rename the field that holds its texts to `text` and give it the ending .jsonl"
        if not found:
            return ""
        ending = ending or ".jsonl"
    elif not (_holds_records(ending) or suffix.lower() in COMPRESSIONS[1:]) or not ending:
        return ""
    return way_out if name.endswith(ending) else f"rename it to end in {ending}"


def _holds_records(ending: str) -> bool:
    kind = format_named(ending)
    return kind is not None and kind.holds_records
