"""One process of a replica reads; the others are sent what their stage needs, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import cast
from unittest import mock

import numpy as np
import pytest
import torch

from data_pipeline.errors import StorageError
from data_pipeline.reading.batch import StepBatch
from data_pipeline.reading.loader import StepLoader
from megadlcm.config import RunConfig
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.process_group import join_process_group
from megadlcm.parallel.watch.activity import THIS_PROCESS, doing
from megadlcm.training.replica_loader import ABSENT, ReplicaLoader, _patient_data, open_loader
from tests.support.distributed import run_distributed

MakeRun = Callable[..., RunConfig]
NUM_STEPS = 3


@dataclass(frozen=True)
class Part:
    """What one process saw."""

    data_parallel_rank: int
    stage: int
    steps: list[StepBatch]
    tars_opened: int


def read_part(config: RunConfig) -> Part:
    """Reads steps on the layout of the config and counts the shards that were opened."""
    mesh = join_process_group(config.parallel)
    with (
        mock.patch("os.open", wraps=os.open) as opened,
        contextlib.closing(open_loader(config, mesh)) as loader,
    ):
        steps = list(islice(loader, NUM_STEPS))
    tars = [call for call in opened.call_args_list if str(call.args[0]).endswith(".tar")]
    return Part(mesh.data_parallel_rank, mesh.pipeline_rank, steps, len(tars))


def assert_same(found: StepBatch, whole: StepBatch, inputs: bool, labels: bool) -> None:
    """Compares a part with what its replica reads; what it does not need must not be there."""
    assert found.first_sample == whole.first_sample
    for part, full in zip(found.micro_batches, whole.micro_batches, strict=True):
        for name, needed in (("tokens_T", inputs), ("labels_T", labels)):
            own, expected = getattr(part, name), getattr(full, name)
            assert own.dtype == np.int64 and own.shape == expected.shape
            assert np.array_equal(own, expected) if needed else (own == ABSENT).all()
        assert np.array_equal(part.cu_seqlens, full.cu_seqlens)
        assert part.cu_seqlens.dtype == np.int32
        assert np.array_equal(part.token_index_T, full.token_index_T)
        assert (part.sample_ids, part.sample_ends) == (full.sample_ids, full.sample_ends)


@pytest.mark.parametrize(
    ("placement", "tensor_size", "stages", "head_stage"),
    [("linear", 2, 2, 1), ("folded", 1, 2, 0), ("linear", 1, 4, 3)],
)
def test_each_process_has_what_its_stage_needs(
    placement: str, tensor_size: int, stages: int, head_stage: int, make_run: MakeRun
) -> None:
    """Against a reader of its own for every replica; only readers open a shard."""
    config = make_run(
        model={"token_kv_heads": 2, "backbone_layers": 4},
        parallel={
            "tensor_parallel_size": tensor_size,
            "pipeline_parallel_size": stages,
            "pipeline_placement": placement,
            "zero_stage": 1,
        },
    )
    parts: list[Part] = run_distributed(read_part, 4, config)
    replicas = 4 // (tensor_size * stages)
    assert {part.data_parallel_rank for part in parts} == set(range(replicas))
    for part in parts:
        loader = StepLoader(
            config.data,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=part.data_parallel_rank,
            data_parallel_size=replicas,
        )
        with contextlib.closing(loader):
            expected = list(islice(loader, NUM_STEPS))
        for found, whole in zip(part.steps, expected, strict=True):
            reads = part.tars_opened > 0  # and keeps what it has read
            assert_same(found, whole, reads or part.stage == 0, reads or part.stage == head_stage)
    readers = [part for part in parts if part.tars_opened]
    assert len(readers) == replicas and all(part.stage == 0 for part in readers)


class WatchedLoader:
    """Stands for a loader whose storage fails; keeps what others would be told meanwhile."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def __next__(self) -> StepBatch:
        self.told.append(THIS_PROCESS.waits_for)
        raise StorageError("no data for 1 s")


def test_others_are_told_that_a_process_reads(make_run: MakeRun) -> None:
    """Not that it computes; and storage that fails is not taken for a collective that broke."""
    mesh = join_process_group(make_run().parallel)
    watched = WatchedLoader()
    loader = ReplicaLoader(cast(StepLoader, watched), mesh, 32, 0, 0)
    with pytest.raises(StorageError):
        next(loader)
    assert watched.told == ["reading of the step's data"]
    assert THIS_PROCESS.waits_for != watched.told[0] and THIS_PROCESS.broke_in is None
    with mock.patch.object(THIS_PROCESS, "broke_in", None):
        with pytest.raises(RuntimeError), doing("a collective"):
            raise RuntimeError
        assert THIS_PROCESS.broke_in == "a collective"


@pytest.mark.parametrize(
    ("processes", "data_seconds", "collective_seconds", "longest"),
    [(1, 600.0, 600.0, 600.0), (4, 600.0, 600.0, 480.0), (4, 60.0, 600.0, 60.0)],
)
def test_who_waits_for_the_storage_speaks_before_those_who_wait_for_it(
    make_run: Callable[..., RunConfig],
    processes: int,
    data_seconds: float,
    collective_seconds: float,
    longest: float,
) -> None:
    config = make_run(
        data={"timeout_seconds": data_seconds},
        parallel={"collective_timeout_seconds": collective_seconds},
    )
    mesh = ParallelMesh(0, processes, 0, torch.device("cpu"))
    assert _patient_data(config, mesh).timeout_seconds == longest
