"""The shards of one part, written so that a killed process loses at most the one it was at.

A part has a folder. Of each shard it holds, in this order, the tar, the document table, and a JSON
file that says what the shard holds and where the input stands behind it: a shard without that file
does not count. `part.json` comes when the part is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.output_folder import close_durably, write_durably, writing
from data_pipeline.prepare.encode import Batch, EncodedBatch
from data_pipeline.prepare.formats.format import BEGINNING, Position
from data_pipeline.shard_format.index import SHARD_DTYPE, DomainCounts, count_domain
from data_pipeline.shard_format.table import encode_table
from data_pipeline.shard_format.tar import archive_end

PART_FILE = "part.json"


def tar_file(folder: Path, number: int) -> Path:
    """Returns the tar of a shard of a part."""
    return folder / f"{number:06d}.tar"


def table_file(folder: Path, number: int) -> Path:
    """Returns the document table of a shard of a part."""
    return folder / f"{number:06d}.documents.npy"


def state_file(folder: Path, number: int) -> Path:
    """Returns the file that makes a shard of a part count."""
    return folder / f"{number:06d}.json"


@dataclass
class PartState:
    """What is finished of a part, and where the input stands."""

    shards: list[tuple[int | bytes, ...]] = field(default_factory=list)
    """A SHARD_DTYPE row each."""
    position: Position = BEGINNING
    """Of the first record that is in none of them."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Of the records before it, by reason."""
    domains: dict[str, DomainCounts] = field(default_factory=dict)
    """Of the shards together."""
    max_token_id: int = 0
    """Of the shards together."""
    altered: int = 0
    """Documents of the shards together whose tokens spell another text."""

    @property
    def rows(self) -> np.ndarray:
        return np.array(self.shards, dtype=SHARD_DTYPE)

    def encode(self) -> bytes:
        facts = {
            "shards": [[_plain(value) for value in row] for row in self.shards],
            "position": self.position,
            "left_out": self.left_out,
            "domains": self.domains,
            "max_token_id": self.max_token_id,
            "altered": self.altered,
        }
        return json.dumps(facts).encode("ascii")


def _plain(value: int | bytes) -> int | str:
    # JSON knows no bytes; numbers are never kept as texts, so decoding can tell them apart.
    return value.hex() if isinstance(value, bytes) else value


def decode_state(contents: bytes) -> PartState:
    """Reads what PartState.encode wrote."""
    facts: dict[str, Any] = json.loads(contents)
    return PartState(
        shards=[
            tuple(bytes.fromhex(value) if isinstance(value, str) else value for value in row)
            for row in facts["shards"]
        ],
        position=Position(*facts["position"]),
        left_out=Counter(facts["left_out"]),
        domains={name: DomainCounts(*counts) for name, counts in facts["domains"].items()},
        max_token_id=facts["max_token_id"],
        altered=facts.get("altered", 0),  # an earlier program looked at none
    )


def resume_part(folder: Path, keep: tuple[str, ...]) -> PartState:
    """Returns what is finished of a part; removes what is not.

    Args:
        folder: of the part; its lock must be held.
        keep: names of files that belong to others.
    """
    state = PartState()
    shards: list[tuple[int | bytes, ...]] = []
    kept = set(keep)
    # The first without a state is the one that was cut off: it and all behind it are written anew.
    while state_file(folder, len(shards)).exists():
        number = len(shards)
        state = decode_state(state_file(folder, number).read_bytes())
        shards += state.shards
        kept |= {at(folder, number).name for at in (tar_file, table_file, state_file)}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state.shards = shards
    return state


@dataclass
class _OpenShard:
    """A shard being written."""

    file: BinaryIO
    size: int = 0
    num_tokens: int = 0
    rows: list[np.ndarray] = field(default_factory=list)
    checksums: list[np.ndarray] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    """Names by the number in the rows."""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def append(self, encoded: EncodedBatch, start: int, end: int) -> np.ndarray:
        """Writes documents start..end-1 of a batch; returns their rows as the table has them."""
        rows = encoded.rows[start:end].copy()
        first = int(rows["record_offset"][0])
        # Records lie one after the other: a stretch of documents is one slice of bytes.
        behind = len(encoded.contents)
        if end < len(encoded.rows):
            behind = int(encoded.rows["record_offset"][end])
        # Offsets of a batch count from its own beginning, those of the table from the shard's.
        for column in ("record_offset", "tokens_offset"):
            rows[column] += self.size - first
        # By first appearance, as if the documents had come one by one: batches must not show.
        numbers, appears = np.unique(rows["domain"], return_index=True)
        own = np.zeros(len(encoded.domains), dtype=np.int32)
        for number in numbers[np.argsort(appears)].tolist():
            name = encoded.domains[number]
            own[number] = self.domains.setdefault(name, len(self.domains))
        rows["domain"] = own[rows["domain"]]
        ends = encoded.checksum_ends
        self.checksums.append(encoded.checksums[ends[start - 1] if start else 0 : ends[end - 1]])
        self.rows.append(rows)
        self.num_tokens += int(rows["num_tokens"].sum())
        self.write(encoded.contents[first:behind])
        return rows

    def write(self, contents: bytes) -> None:
        with writing(Path(self.file.name)):
            self.file.write(contents)
        self.digest.update(contents)
        self.size += len(contents)


class PartWriter:
    """Cuts the documents of a part into shards: a shard ends where the next one does not fit."""

    def __init__(self, folder: Path, state: PartState, shard_tokens: int) -> None:
        """Goes on behind what is finished.

        Args:
            folder: of the part; its lock must be held.
            state: from resume_part; updated.
            shard_tokens: most text tokens of a shard; a longer document has one of its own.
        """
        self.num_tokens = 0
        """Text tokens written by this writer."""
        self._folder, self._state, self._shard_tokens = folder, state, shard_tokens
        self._open: _OpenShard | None = None

    def add(self, batch: Batch, encoded: EncodedBatch) -> None:
        ends = np.cumsum(encoded.rows["num_tokens"])
        counted = start = 0
        while start < len(encoded.rows):
            shard = self._open or self._new_shard()
            before = int(ends[start - 1]) if start else 0
            # Counted from the beginning of the batch, so that one search finds the last document
            # that fits.
            room = before + self._shard_tokens - shard.num_tokens
            end = int(np.searchsorted(ends, room, side="right"))
            # A document longer than a shard has one of its own: none is ever cut.
            if end <= start and shard.num_tokens == 0:
                end = start + 1
            if end > start:
                self._append(shard, encoded, start, end)
                start = end
            if start < len(encoded.rows):
                # What is left out belongs to the shard in whose stretch of the input it stands.
                number = int(encoded.numbers[start])
                counted = self._count_left_out(encoded, counted, number)
                self._close_shard(_position(batch, number))
        self._count_left_out(encoded, counted, None)

    def finish(self, end: Position) -> PartState:
        """Completes the part; `end` is where its input ends."""
        if self._open is not None:
            self._close_shard(end)
        self._state.position = end
        write_durably(self._folder / PART_FILE, self._state.encode())
        return self._state

    def close(self) -> None:
        """Closes the file that is open, if any; a shard that has not ended does not count."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # on a full disk it fails again
                self._open.file.close()
            self._open = None

    def _append(self, shard: _OpenShard, encoded: EncodedBatch, start: int, end: int) -> None:
        rows = shard.append(encoded, start, end)
        self.num_tokens += int(rows["num_tokens"].sum())
        self._state.max_token_id = max(self._state.max_token_id, encoded.max_token_id)
        self._state.altered += int(encoded.altered[start:end].sum())

    def _count_left_out(self, encoded: EncodedBatch, counted: int, before: int | None) -> int:
        """Counts those before a record (None: all) from `counted` on; returns how many are now."""
        while counted < len(encoded.left_out):
            number, reason = encoded.left_out[counted]
            if before is not None and number >= before:
                break
            self._state.left_out[reason] += 1
            counted += 1
        return counted

    def _new_shard(self) -> _OpenShard:
        path = tar_file(self._folder, len(self._state.shards))
        self._open = _OpenShard(open(path, "wb"))  # noqa: SIM115
        return self._open

    def _close_shard(self, position: Position) -> None:
        """Makes the open shard count; `position` is that of the first record behind it."""
        shard, number = self._open, len(self._state.shards)
        if shard is None:
            raise AssertionError("no shard is open")
        shard.write(archive_end(shard.size))
        with writing(Path(shard.file.name), shard.size):
            close_durably(shard.file)  # before the file that makes the shard count
        rows, names = np.concatenate(shard.rows), list(shard.domains)
        # Tar, table, state: a kill between them leaves a shard without a state, which counts for
        # nothing.
        table = encode_table(rows, np.concatenate(shard.checksums), names)
        write_durably(table_file(self._folder, number), table)
        for at, name in enumerate(names):
            own = rows[rows["domain"] == at]
            tokens, size = (int(own[key].sum()) for key in ("num_tokens", "num_bytes"))
            counts = DomainCounts(len(own), tokens, size)
            count_domain(self._state.domains, name, counts)
        facts = (
            len(rows),
            shard.num_tokens,
            int(rows["num_bytes"].sum()),
            shard.size,
            int(rows["record_offset"][-1]),
            shard.digest.digest(),
            hashlib.sha256(table).digest(),
        )
        self._state.shards.append(facts)
        self._state.position = position
        # Each file tells of one shard only: rewriting the whole list would be quadratic in them.
        alone = PartState([facts], position, *self._totals())
        write_durably(state_file(self._folder, number), alone.encode())
        self._open = None

    def _totals(self) -> tuple[Counter[str], dict[str, DomainCounts], int, int]:
        state = self._state
        return state.left_out, state.domains, state.max_token_id, state.altered


def _position(batch: Batch, number: int) -> Position:
    """Returns where a record of a batch stands."""
    piece = next(piece for piece in batch.pieces if number < piece.end_number)
    start = piece.start
    return Position(start.file, start.record + number - start.number, number)
