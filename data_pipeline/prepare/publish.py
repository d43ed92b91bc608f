"""From complete parts to a shard folder: the earlier shards give way, index.json comes last.

The new index is first written to a subfolder of the unfinished work. From then on the decision has
fallen: whenever the moves are cut off, the next prepare makes the rest of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.output_folder import sync_path, write_durably
from data_pipeline.prepare.encode import token_dtype
from data_pipeline.prepare.parts import PartState, table_file, tar_file
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.work_folder import WorkFolder
from data_pipeline.shard_format.index import (
    INDEX_FILE,
    SHARD_DTYPE,
    DomainCounts,
    ShardIndex,
    ShardList,
    count_domain,
    encode_index,
    read_index,
    shard_number,
    table_name,
    tar_name,
)
from data_pipeline.shard_format.prepared import (
    PREPARED_FILE,
    altered_documents,
    altered_fact,
    encode_prepared,
    read_prepared,
)
from data_pipeline.tokenizer import TOKENIZER_FILE, Tokenizer

READY_FOLDER = "ready"


def is_published(output: Path, plan: Plan) -> bool:
    """Whether a folder holds the finished shards of a plan."""
    return (output / INDEX_FILE).is_file() and read_prepared(output).get("plan") == plan.sha256


def published(output: Path) -> tuple[ShardIndex, Counter[str], int]:
    """Returns the index of a finished folder, what was left out, and how many are altered."""
    facts = read_prepared(output)
    return read_index(output), Counter(facts.get("left_out", {})), altered_documents(facts)


def is_decided(work: WorkFolder) -> bool:
    """Whether nothing but moves is missing."""
    return (work.folder / READY_FOLDER / INDEX_FILE).exists()


def publish(work: WorkFolder, plan: Plan, tokenizer: Tokenizer, parts: Sequence[PartState]) -> None:
    """Makes the complete parts of a plan the shards of the folder; inside the gate.

    Args:
        work: where they are.
        plan: theirs.
        tokenizer: theirs.
        parts: of each part of the plan, its state.
    """
    if not is_decided(work):
        _decide(work, plan, tokenizer, parts)
    ready = work.folder / READY_FOLDER
    # Read back, not made again: after a restart the one that was decided on counts.
    index = (ready / INDEX_FILE).read_bytes()
    _move(work, parts, index)
    for path in sorted(ready.iterdir()):
        # The tokenizer and the rest may be replaced: without an index the folder is unfinished
        # anyway.
        if path.name != INDEX_FILE:
            os.replace(path, work.output / path.name)
    sync_path(work.output)
    write_durably(work.output / INDEX_FILE, index)
    work.finish()


def _decide(work: WorkFolder, plan: Plan, tokenizer: Tokenizer, parts: Sequence[PartState]) -> None:
    """Writes all that is not a shard, the index last."""
    domains: dict[str, DomainCounts] = {}
    left_out = Counter(plan.left_out)
    for part in parts:
        left_out += part.left_out
        for name, counts in part.domains.items():
            count_domain(domains, name, counts)
    index = ShardIndex(
        location=str(work.output),
        shards=ShardList(np.concatenate([np.empty(0, SHARD_DTYPE), *(p.rows for p in parts)])),
        domains=domains,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        # The end of text is no stored token, and yet one that a reader meets.
        max_token_id=max(tokenizer.eos_id, *(part.max_token_id for part in parts)),
        token_dtype=token_dtype(tokenizer.vocab_size).name,
    )
    facts = {
        "plan": plan.sha256,
        "options": plan.options,
        "num_inputs": len(plan.files),
        "input_bytes": sum(file.num_bytes for file in plan.files),
        "num_parts": len(plan.parts),
        "left_out": dict(sorted(left_out.items())),
        **altered_fact(sum(part.altered for part in parts)),
    }
    files = {
        TOKENIZER_FILE: tokenizer.contents,
        PREPARED_FILE: encode_prepared(facts),
        **encode_index(index),
    }
    ready = work.folder / READY_FOLDER
    ready.mkdir(exist_ok=True)
    # The index is the last of them: its presence is the decision, see is_decided.
    for name, contents in files.items():
        write_durably(ready / name, contents)


def _move(work: WorkFolder, parts: Sequence[PartState], index: bytes) -> None:
    """Moves the shards up as far as they are not, and removes those of earlier ones that stay."""
    output = work.output
    earlier = output / INDEX_FILE
    # First of all: from here on no reader may take mixed shards for a finished folder.
    if earlier.exists() and earlier.read_bytes() != index:
        earlier.unlink()
        sync_path(output)
    number = 0
    for at, part in enumerate(parts):
        folder = work.part(at)
        for own in range(len(part.shards)):
            for path, name in (
                (tar_file(folder, own), tar_name(number)),
                (table_file(folder, own), table_name(number)),
            ):
                if path.exists():  # else it was moved before this process took over
                    os.replace(path, output / name)
            number += 1
    for path in output.iterdir():
        found = shard_number(path.name)
        # Earlier shards of higher numbers, which no new one has replaced.
        if found is not None and found >= number:
            path.unlink()
