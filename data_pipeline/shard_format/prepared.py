"""What a finished shard folder says of its making; nobody needs it to read the shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.small_file import read_small

PREPARED_FILE = "prepared.json"
_DIGEST = "sha256"
_ALTERED = "altered_documents"


def encode_prepared(facts: dict[str, Any]) -> bytes:
    """Returns facts as a file that also holds their digest."""
    signed = {**facts, _DIGEST: _digest(facts)}
    return (json.dumps(signed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def decode_prepared(contents: bytes) -> dict[str, Any]:
    """Returns the facts of a file.

    Raises:
        ValueError: it is not what was written.
    """
    facts = json.loads(contents.decode("utf-8"))
    if isinstance(facts, dict):
        facts.pop(_DIGEST, None)
        # Byte for byte: another order of the keys or another space was not written here.
        if encode_prepared(facts) == contents:
            return facts
    raise ValueError("not the one that was written with the shards")


def read_prepared(folder: Path) -> dict[str, Any]:
    """Returns what a finished folder says of its making; empty where it does not."""
    try:
        return decode_prepared(read_small(folder / PREPARED_FILE))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def altered_fact(count: int) -> dict[str, int]:
    """Returns the entry on documents whose tokens spell another text; none where none do."""
    return {_ALTERED: count} if count else {}


def altered_documents(facts: dict[str, Any]) -> int:
    """Returns how many documents have tokens that spell another text, as far as it is known."""
    count = facts.get(_ALTERED, 0)
    return count if isinstance(count, int) else 0


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode("ascii")).hexdigest()
