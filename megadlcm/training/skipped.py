"""Damaged data of a run: all processes decide the same, and what is left out is written down.

What a read finds wrong is a function of the stored bytes, and one process reads for its whole
replica; so all that has to be agreed on is when to stop. `OUTPUT_DIR/skipped/` keeps a file per
reading process with a line for each place that was left out, and `shards.jsonl` with what was
found wrong when a run started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DamagedDataError
from data_pipeline.output_folder import writing
from data_pipeline.reading.batch import StepBatch
from data_pipeline.reading.sources import DamagedShard, check_shards
from megadlcm.config import RunConfig
from megadlcm.engine.state import TrainState
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)


def damaged_shards(config: RunConfig, mesh: ParallelMesh | None = None) -> list[DamagedShard]:
    """Looks at every shard of a run, each process at its share; collective.

    Args:
        config: the run.
        mesh: ranks of this process; None: it looks at all of them by itself.

    Returns:
        Those that are damaged and may be skipped, the same on every process.

    Raises:
        DamagedDataError: on every process, where one is damaged that may not be skipped.
    """
    if mesh is None:
        found = check_shards(config.data)
    else:
        own = check_shards(config.data, mesh.rank, mesh.world_size)
        found = [shard for part in mesh.gather_over_run(own) for shard in part]
        found.sort(key=lambda shard: (shard.split, shard.source, shard.shard))
    for shard in found:
        if config.data.on_damage != "skip" or shard.split == "valid":
            raise DamagedDataError(shard.problem)
    return found


class SkippedRecord:
    """Keeps what is left out of the samples of a run.

    Args:
        config: the run.
        mesh: ranks of this process.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh) -> None:
        self._data, self._mesh = config.data, mesh
        self._folder = Path(config.output_dir) / files.SKIPPED

    def note_shards(self, damaged: Sequence[DamagedShard]) -> None:
        """Records the shards that were found damaged when the run started."""
        if damaged and self._mesh.is_writer:
            for shard in damaged:
                logger.warning("%s; what cannot be read of it is skipped", shard.problem)
            self._write("shards.jsonl", [asdict(shard) for shard in damaged])

    def add(self, batch: StepBatch, state: TrainState) -> None:
        """Counts and records what a step lacks; collective where the policy is to skip.

        Args:
            batch: this process's part of the step.
            state: counters; `skipped_tokens` is updated, the same on every process.

        Raises:
            DamagedDataError: on every process, where more is lost than data.max_skipped_tokens.
        """
        if self._data.on_damage != "skip":
            return
        # summed over all replicas before anybody decides, so that all decide the same
        lost = sum(place.num_tokens for place in batch.skipped)
        total = torch.tensor([lost], dtype=torch.int64, device=self._mesh.device)
        state.skipped_tokens += int(self._mesh.sum_over_data_parallel(total))
        # others have the list too, from the one that reads: each loss is recorded once
        if batch.skipped and self._mesh.reads_data:
            for place in batch.skipped:
                logger.warning(
                    "sample %d lacks %d tokens: %s", place.sample, place.num_tokens, place.reason
                )
            step = state.step + 1
            rows = [{"step": step} | asdict(place) for place in batch.skipped]
            self._write(f"rank_{self._mesh.rank:04d}.jsonl", rows)
        # after the record, so that what stopped the run can be read there
        if state.skipped_tokens > self._data.max_skipped_tokens:
            raise DamagedDataError(
                f"data.max_skipped_tokens = {self._data.max_skipped_tokens}: "
                f"{state.skipped_tokens} tokens could not be read by step {state.step + 1}, see "
                f"{self._folder}; repair the shards or raise the limit",
                key="data.max_skipped_tokens",
            )

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self._folder / name
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
