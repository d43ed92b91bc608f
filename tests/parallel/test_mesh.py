from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from megadlcm.parallel.process_group import join_process_group
from tests.support.distributed import RankFailedError, run_distributed


def test_a_run_of_one_process_makes_a_group_of_its_own() -> None:
    mesh = join_process_group()
    assert join_process_group() == mesh
    assert (mesh.data_parallel_rank, mesh.data_parallel_size, mesh.is_writer) == (0, 1, True)
    assert mesh.sum_over_data_parallel(torch.tensor([2.0])).tolist() == [2.0]
    assert mesh.gather_over_data_parallel("a") == ["a"] and mesh.broadcast_object("b") == "b"


def collect_on_each_rank() -> dict[str, Any]:
    mesh = join_process_group()
    mesh.barrier()
    return {
        "rank": (mesh.rank, mesh.world_size, mesh.local_rank, mesh.is_writer),
        "sum": mesh.sum_over_data_parallel(torch.tensor([1.0, mesh.rank])).tolist(),
        "gathered": mesh.gather_over_data_parallel({"rank": mesh.rank}),
        "broadcast": mesh.broadcast_object(f"from {mesh.rank}"),
    }


def fail_on_one_rank() -> None:
    mesh = join_process_group()
    if mesh.rank == 1:
        raise ValueError("only here")
    mesh.barrier()
    time.sleep(600.0)


@pytest.mark.slow
def test_ranks_sum_gather_and_broadcast_alike() -> None:
    results = run_distributed(collect_on_each_rank, 2)
    assert [result.pop("rank") for result in results] == [(0, 2, 0, True), (1, 2, 1, False)]
    expected = {
        "sum": [2.0, 1.0],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "broadcast": "from 0",
    }
    assert results == [expected, expected]


def wait_for_ever() -> None:
    time.sleep(600.0)


@pytest.mark.slow
def test_a_rank_that_fails_is_named_although_another_one_waits_for_it() -> None:
    """Of the launcher that the parallel tests rely on: it neither hangs nor hides the reason."""
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed.*ValueError: only here"):
        run_distributed(fail_on_one_rank, 2)
    with pytest.raises(RankFailedError, match=r"(?s)timed out.*rank_0"):
        run_distributed(wait_for_ever, 1, timeout_seconds=1.0)
