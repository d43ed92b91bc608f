"""What processes would really hold is compared with the plan, and a difference is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megadlcm.config import RunConfig, load_config
from megadlcm.parallel import partition, verify
from megadlcm.parallel.partition import Partition
from megadlcm.parallel.verify import MismatchError, Verified, verify_layout
from megadlcm.plan.accounting import count_parameters
from megadlcm.plan.stages import Chunk
from tests.support.distributed import run_distributed
from tests.support.paths import CONFIGS

LARGE = ["model.vocab_size=128816"]
LAYOUTS = [
    (1, 1, "linear", "false", 8),
    (1, 8, "linear", "false", 64),
    (4, 4, "folded", "true", 512),
    (2, 3, "folded", "false", 12),
]


def large_run(tensor: int, pipeline: int, placement: str, rows: str) -> RunConfig:
    return load_config(
        CONFIGS / "dlcm_2.3b.yaml",
        [
            *LARGE,
            f"parallel.tensor_parallel_size={tensor}",
            f"parallel.pipeline_parallel_size={pipeline}",
            f"parallel.pipeline_placement={placement}",
            f"parallel.sequence_parallel={rows}",
            "training.global_batch_size=3072",
        ],
    )


def verify_all(runs: list[tuple[RunConfig, int]]) -> tuple[list[Verified], list[str]]:
    """What was verified, and the message for each mistake that was made on purpose."""
    return [verify_layout(config, size) for config, size in runs], list(mistakes(runs[2]))


def mistakes(run: tuple[RunConfig, int]) -> list[str]:
    found = []
    exact = partition.make_partition

    def moved(config: RunConfig) -> Partition:
        """A block that lies on another stage than the plan says."""
        result = exact(config)
        name = "encoder.blocks.0.attention.wq.weight"
        part = dataclasses.replace(result.specs[name], stage=result.specs[name].stage + 1)
        return Partition(result.chunks, result.specs | {name: part})

    def whole(config: RunConfig) -> Partition:
        """A matrix that nobody cuts."""
        result = exact(config)
        name = "decoder.blocks.0.feed_forward.w_up.weight"
        part = dataclasses.replace(result.specs[name], dimension=None)
        return Partition(result.chunks, result.specs | {name: part})

    def twice(config: RunConfig) -> Partition:
        """A unit that two stages count as theirs."""
        result = exact(config)
        chunks: list[Chunk] = list(result.chunks)
        chunks[1] = dataclasses.replace(chunks[1], units=(*chunks[0].units, *chunks[1].units))
        return Partition(chunks, result.specs)

    def uncounted(*arguments: Any) -> int:
        """A formula that forgets the gains."""
        return 0

    for name, wrong in (
        ("make_partition", moved),
        ("make_partition", whole),
        ("make_partition", twice),
        ("whole_parameters", uncounted),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, name, wrong)
            try:
                verify_layout(*run)
                found.append("")
            except MismatchError as error:
                found.append(str(error))
    return found


def test_all_processes_hold_what_the_plan_says_and_mistakes_are_found() -> None:
    runs = [(large_run(t, p, place, rows), size) for t, p, place, rows, size in LAYOUTS]
    ((verified, messages),) = run_distributed(verify_all, 1, runs)
    for (tensor, pipeline, *_), (config, _), result in zip(LAYOUTS, runs, verified, strict=True):
        assert result.processes == tensor * pipeline == len(result.weight_bytes)
        total = sum(result.weight_bytes.values()) / 2  # bytes of a bf16 number
        whole = count_parameters(config.model)["total"]
        if tensor == 1:
            assert total == whole
        else:  # gains, detector and pool are on every process
            assert whole < total < 1.02 * whole
    assert all(message.startswith("rank ") for message in messages)
    assert "parameters of encoder.0" in messages[0]
    assert "parameters of decoder.0" in messages[1]
    assert "parameters of token_embedding" in messages[2]
    assert "the plan says" in messages[3]
