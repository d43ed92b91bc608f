"""Input files to documents: .txt, .jsonl (plain, gzip, zstd) and source trees, in a fixed order."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError

JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (".txt", *JSONL_ENDINGS)
DEFAULT_DOMAIN = "text"
TREE_DOMAIN = "code"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class TextDocument:
    """A document before it is tokenised."""

    id: str
    domain: str
    source: str
    text: str
    num_bytes: int
    """Bytes of the text in UTF-8."""
    origin: str
    """File and line, for messages."""


@dataclass(frozen=True)
class InputFile:
    """One file found by an --input."""

    path: Path
    relative: str
    """Path below the fixed part of the pattern: the same wherever the corpus lies."""
    tree: str = ""
    """Name of the source tree it belongs to; empty for .txt and .jsonl inputs."""


@dataclass
class ReadCounts:
    """How far the reading has come and what it left out."""

    total_bytes: int = 0
    finished_bytes: int = 0
    skipped_empty: int = 0
    skipped_binary: int = 0
    skipped_links: int = 0
    """Symbolic links of source trees, to files or folders."""
    current: IO[bytes] | None = field(default=None, repr=False)

    @property
    def done_bytes(self) -> int:
        """Bytes of input consumed, as stored (compressed where the file is)."""
        return self.finished_bytes + (self.current.tell() if self.current else 0)

    @property
    def left_out(self) -> str:
        """What was left out and how often, for people; empty where nothing was."""
        counts = {
            "empty": self.skipped_empty,
            "binary": self.skipped_binary,
            "symbolic links": self.skipped_links,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def find_inputs(patterns: Sequence[str], counts: ReadCounts) -> list[InputFile]:
    """Returns the files of all --input patterns: patterns in their order, paths sorted in each.

    Args:
        patterns: file names, globs (`**` descends) or directories (source trees).
        counts: told of the links that are left out.

    Raises:
        InputError: nothing matches, an unknown ending, or a file that two patterns match.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        # A name that exists is taken as it is, brackets and all.
        literal = os.path.exists(pattern)
        base = os.path.dirname(pattern) or "." if literal else _fixed_part(pattern)
        matches = [pattern] if literal else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise InputError(f"--input {pattern}: matches no file or directory; check the pattern")
        for match in matches:
            path = Path(match)
            if path.is_dir():
                if "**" not in pattern:  # `**` also yields the folders of the files it matches
                    found += _tree_files(path, counts)
            elif path.name.endswith(ENDINGS):
                found.append(InputFile(path, os.path.relpath(path, base).replace(os.sep, "/")))
            else:
                raise InputError(
                    f"--input {pattern}: {path} ends in none of {', '.join(ENDINGS)}; "
                    "name the directory itself to read it as a source tree"
                )
    seen: set[str] = set()
    for file in found:
        real = os.path.realpath(file.path)
        if real in seen:
            raise InputError(
                f"--input: {file.path} is matched twice, every document may enter once; "
                "narrow one of the patterns"
            )
        seen.add(real)
    return found


def read_documents(
    files: Sequence[InputFile],
    counts: ReadCounts,
    domain: str | None = None,
    skip_empty: bool = False,
) -> Iterator[TextDocument]:
    """Yields the documents of the files in order, holding one at a time.

    Args:
        files: from find_inputs.
        counts: updated while reading.
        domain: domain of documents that name none; None means "code" in trees, else "text".
        skip_empty: leave out and count documents without text instead of refusing them.

    Raises:
        InputError: bad UTF-8, bad JSON, no text field, a name that cannot be stored, or an empty
            document; names file and line.
    """
    counts.total_bytes += sum(file.path.stat().st_size for file in files)
    for file in files:
        with _opened(file.path) as raw:
            counts.current = raw
            if file.tree:
                documents = _read_tree_file(file, raw, domain or TREE_DOMAIN, counts)
            elif file.path.name.endswith(".txt"):
                documents = _read_text_file(file, raw, domain or DEFAULT_DOMAIN)
            else:
                documents = _read_jsonl_file(file, raw, domain or DEFAULT_DOMAIN)
            for document in documents:
                if document.text:
                    _check_names(document)
                    yield document
                elif skip_empty:
                    counts.skipped_empty += 1
                else:
                    raise empty_document(document)
        counts.current = None
        counts.finished_bytes += file.path.stat().st_size


def empty_document(document: TextDocument) -> InputError:
    """Returns the error for a document that has nothing to train on."""
    return InputError(
        f"{document.origin}: document {document.id!r} is empty, a document needs at least one "
        "token; remove it or pass --skip-empty"
    )


def _check_names(document: TextDocument) -> None:
    """Raises InputError where a shard cannot hold what the record, or its file, is called."""
    for key in ("id", "domain", "source"):
        name: str = getattr(document, key)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            origin = document.origin.encode("utf-8", "backslashreplace").decode("utf-8")
            raise InputError(
                f"{origin}: {key} = {name!r}, UTF-8 cannot store its character {error.start}; "
                "fix the record, or rename the file where it is a file's name"
            ) from error


def _fixed_part(pattern: str) -> str:
    """Returns the directory before the first wildcard."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return fixed or "."


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")  # closed by the caller's `with`
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def _tree_files(root: Path, counts: ReadCounts) -> list[InputFile]:
    """Returns every file below a directory but hidden ones, byte code and links, sorted by path.

    What a link leads to is a file of the tree already, or none of it.
    """
    relative: list[str] = []
    for folder, folders, all_names in os.walk(root):  # enters no link
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        names = [name for name in all_names if name[0] != "."]
        below = os.path.relpath(folder, root)
        relative += [os.path.normpath(os.path.join(below, name)) for name in names]
        linked = [os.path.islink(os.path.join(folder, name)) for name in (*folders, *names)]
        counts.skipped_links += sum(linked)
    shards = [name for name in relative if os.sep not in name and name.endswith(JSONL_ENDINGS)]
    if shards:
        raise InputError(
            f"--input {root}: a directory is read as a source tree, but it holds {min(shards)}; "
            f"write --input '{root}/*.jsonl*' to read its records"
        )
    paths = [(name, root / name) for name in relative]
    regular = [name for name, path in paths if path.is_file() and not path.is_symlink()]
    if not regular:
        raise InputError(f"--input {root}: no files in this directory; check the path")
    name = root.resolve().name
    return [
        InputFile(root / path, f"{name}/{path}".replace(os.sep, "/"), tree=name)
        for path in sorted(regular)
    ]


def _read_tree_file(
    file: InputFile, raw: IO[bytes], domain: str, counts: ReadCounts
) -> Iterator[TextDocument]:
    """Yields a source file as one document, nothing when it is binary."""
    contents = raw.read()
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        counts.skipped_binary += 1
        return
    origin = str(file.path)
    yield TextDocument(file.relative, domain, file.tree, text, len(contents), origin)


def _read_text_file(file: InputFile, raw: IO[bytes], domain: str) -> Iterator[TextDocument]:
    contents = raw.read()
    try:
        text = contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise _bad_utf8(f"{file.path}:{line}", error.start) from error
    name = file.relative
    yield TextDocument(name, domain, name, text, len(contents), f"{file.path}:1")


def _read_jsonl_file(file: InputFile, raw: IO[bytes], domain: str) -> Iterator[TextDocument]:
    for number, line in enumerate(_lines(file.path, raw), start=1):
        if not line.strip():
            continue  # a blank line holds no record
        origin = f"{file.path}:{number}"
        record = _parse_record(line, origin)
        text = record["text"]
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InputError(
                f"{origin}: text holds half a surrogate pair at character {error.start}, which "
                "UTF-8 cannot store; fix the record"
            ) from error
        yield TextDocument(
            id=_name(record, "id", f"{file.relative}:{number}"),
            domain=_name(record, "domain", domain),
            source=_name(record, "source", file.relative),
            text=text,
            num_bytes=num_bytes,
            origin=origin,
        )


def _parse_record(line: bytes, origin: str) -> dict[str, Any]:
    """Returns the JSON object of a line; its "text" is a string."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad_utf8(origin, error.start) from error
    except (ValueError, RecursionError) as error:  # ValueError also for too long an integer
        raise InputError(
            f"{origin}: not JSON that can be read ({error}); every line must be an object with a "
            "`text`; fix or remove the line"
        ) from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise InputError(f"{origin}: a {kind}, must be an object with a `text`; fix the line")
    if not isinstance(record.get("text"), str):
        raise InputError(
            f"{origin}: text = {str(record.get('text'))[:40]!r}, every record must have a string "
            f"`text` (it has: {', '.join(sorted(record)) or 'nothing'}); add or rename the field"
        )
    return record


def _name(record: dict[str, Any], key: str, default: str) -> str:
    """Returns an optional field as a string; the default where it is absent or null."""
    value = record.get(key)
    return default if value is None or value == "" else str(value)


def _bad_utf8(origin: str, position: int) -> InputError:
    return InputError(
        f"{origin}: byte {position} is not UTF-8, all input must be; convert the file with iconv"
    )


def _lines(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a plain, gzip or zstd file; raises InputError on a damaged one."""
    try:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as plain:
                yield from plain
        elif path.name.endswith(".zst"):
            yield from _zstd_lines(path, raw)
        else:
            yield from raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _zstd_lines(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    import zstandard  # only needed for .zst inputs

    # Frame by frame: the library's stream reader takes a file cut inside a frame for a whole one.
    frame = zstandard.ZstdDecompressor().decompressobj()
    inside, rest, chunk = False, b"", raw.read(READ_BYTES)
    try:
        while chunk:
            inside = True
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = b""
            if frame.eof:
                inside, chunk = False, frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
            chunk = chunk or raw.read(READ_BYTES)
    except zstandard.ZstdError as error:
        raise _damaged(path, str(error)) from error
    if inside:
        raise _damaged(path, "the file ends inside a compressed frame")
    if rest:
        yield rest


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: damaged compressed file ({reason}); fetch or compress it again")
