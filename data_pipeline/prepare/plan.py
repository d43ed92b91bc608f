"""What a prepare is to do, as far as it shapes the result: files, parts and options.

The input files are cut into parts, the units of work: consecutive files until they are large
enough. A shard ends where its part ends.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from data_pipeline.prepare.encode import DocumentRules
from data_pipeline.prepare.formats.format import InputFile

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The same plan gives the same bytes."""

    files: tuple[InputFile, ...]
    """In reading order."""
    tokenizer_sha256: str
    shard_tokens: int
    """Most text tokens of a shard."""
    part_bytes: int
    """A part ends with the file that brings it to this size."""
    deduplicate: bool
    rules: DocumentRules
    left_out: Counter[str] = field(default_factory=Counter)
    """What was left out in finding the files."""

    @cached_property
    def parts(self) -> tuple[tuple[InputFile, ...], ...]:
        return tuple(_cut(self.files, self.part_bytes))

    @property
    def options(self) -> dict[str, Any]:
        """What shapes the result besides the files."""
        rules = asdict(self.rules)
        # It changes no byte but whether they are written: who is refused may go on with it.
        del rules["allow_altered"]
        return {
            "tokenizer_sha256": self.tokenizer_sha256,
            "shard_tokens": self.shard_tokens,
            "part_bytes": self.part_bytes,
            "deduplicate": self.deduplicate,
            **rules,
        }

    @cached_property
    def contents(self) -> bytes:
        """The plan as a file: who finds other bytes there has another plan."""
        # Names below the pattern and sizes, no absolute paths and no times: a corpus may be moved.
        described = {
            "version": VERSION,
            "options": self.options,
            "left_out": dict(sorted(self.left_out.items())),
            "inputs": [[file.relative, file.num_bytes] for file in self.files],
        }
        return (json.dumps(described, ensure_ascii=True) + "\n").encode("ascii")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.contents).hexdigest()

    def difference(self, other: bytes) -> str:
        """Says in what the plan of a file differs from this one; empty where it does not."""
        if other == self.contents:
            return ""
        mine = json.loads(self.contents)
        try:
            its = json.loads(other)
            # A file of another program may lack any key: so the version is looked at first.
            if its["version"] != VERSION:
                return f"plan version {its['version']}, this program has {VERSION}"
            for key, value in mine["options"].items():
                if its["options"].get(key) != value:
                    return f"{_option(key)} was {its['options'].get(key)}, is {value}"
            return _input_difference(its["inputs"], mine["inputs"]) or "what was left out"
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "a plan that cannot be read"


def _option(key: str) -> str:
    return f"--{key.removesuffix('_sha256').replace('_', '-')}"


def _input_difference(its: Sequence[Sequence[Any]], mine: Sequence[Sequence[Any]]) -> str:
    for (name, size), (my_name, my_size) in zip(its, mine, strict=False):
        if name != my_name:
            return f"input {my_name} where {name} was"
        if size != my_size:
            return f"input {name} had {size:,} bytes, has {my_size:,}"
    return f"{len(its):,} input files, now {len(mine):,}" if len(its) != len(mine) else ""


def _cut(files: Sequence[InputFile], part_bytes: int) -> Iterator[tuple[InputFile, ...]]:
    part: list[InputFile] = []
    size = 0
    for file in files:
        part.append(file)
        size += file.num_bytes
        # A part ends behind a file, never inside: a file is read by one process from its beginning.
        if size >= part_bytes:
            yield tuple(part)
            part, size = [], 0
    if part:
        yield tuple(part)
