"""The same config gives the same step and the same run, whatever replicas and ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.model import build_model
from megadlcm.model.scaling import parameter_table
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from tests.support.checkpoints import load_tensors, newest_folder
from tests.support.distributed import run_distributed
from tests.support.gradients import reference_gradients, sgd_run, worst_error
from tests.support.layouts import (
    SAVED_STEPS,
    Checks,
    LayoutStep,
    Results,
    Start,
    evaluation_row,
    run_checks,
    save_and_go_on,
    sgd_steps,
    start_again,
)
from tests.support.tiny_runs import tiny_run

pytestmark = pytest.mark.slow

MakeRun = Callable[..., RunConfig]


class Layout(NamedTuple):
    """How a step is cut."""

    ranks: int
    zero_stage: int
    micro_batch_size: int
    precision: str = "fp32"


FP32 = [
    Layout(ranks, zero_stage, micro)
    for ranks, micro in ((2, 1), (2, 2), (4, 1))
    for zero_stage in (0, 1, 2, 3)
]
BF16 = [Layout(ranks, zero_stage, 1, "bf16") for ranks in (2, 4) for zero_stage in (1, 2, 3)]
SAVED = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
Steps = dict[Layout, list[LayoutStep]]
"""The step of each rank."""


@pytest.fixture(scope="module")
def make(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Function(output name, **sections) -> config, in one folder for all tests of this file."""
    folder = tmp_path_factory.mktemp("data_parallel")

    def make_run(output: str = "run", **sections: Any) -> RunConfig:
        return tiny_run(corpus, folder / output, **sections)

    return make_run


def one_step(make: MakeRun, corpus: Path, layout: Layout) -> RunConfig:
    """SGD with sampled boundaries, a ratio loss of weight 3 and one window that is not full."""
    zero_stage, precision = str(layout.zero_stage), layout.precision
    return sgd_run(
        make, corpus, layout.micro_batch_size, zero_stage=zero_stage, precision=precision
    )


def checkpointed(make: MakeRun, output: str, precision: str, zero_stage: int) -> RunConfig:
    """A run that one layout saves and another one continues."""
    return make(
        f"{output}_{precision}",
        training={"precision": precision},
        parallel={"zero_stage": zero_stage},
    )


def evaluated(make: MakeRun, zero_stage: int) -> RunConfig:
    return make(parallel={"zero_stage": zero_stage}, evaluation={"batch_tokens": 64})


def whole_run(make: MakeRun, output: str, zero_stage: int) -> RunConfig:
    return make(output, parallel={"zero_stage": zero_stage}, evaluation={"batch_tokens": 64})


@pytest.fixture(scope="module")
def one_rank(make: MakeRun) -> dict[str, LayoutStep]:
    """Saves as a single process; the uninterrupted step after that, for each precision."""
    return {
        precision: save_and_go_on(checkpointed(make, "one_rank", precision, 1))
        for precision in ("fp32", "bf16")
    }


@pytest.fixture(scope="module")
def two_ranks(make: MakeRun, corpus: Path, one_rank: dict[str, LayoutStep]) -> list[Results]:
    """Everything that happens on two ranks; comes after what a single process saves for them."""
    assert one_rank
    layouts = [layout for layout in FP32 + BF16 if layout.ranks == 2]
    checks = Checks(
        sgd=[one_step(make, corpus, layout) for layout in layouts],
        control=one_step(make, corpus, Layout(2, 1, 2)),
        bad_loss=[make(parallel={"zero_stage": zero_stage}) for zero_stage in (0, 1, 2, 3)],
        evaluation=[evaluated(make, zero_stage) for zero_stage in (1, 3)],
        saving=[checkpointed(make, f"stage_{saved[1]}", *saved) for saved in SAVED],
        starting=[checkpointed(make, "one_rank", *saved) for saved in SAVED],
        run=whole_run(make, "run_of_two", zero_stage=3),
    )
    return run_distributed(run_checks, 2, checks)


@pytest.fixture(scope="module")
def steps(make: MakeRun, corpus: Path, two_ranks: list[Results]) -> Steps:
    four = [layout for layout in FP32 + BF16 if layout.ranks == 4]
    four_ranks = run_distributed(sgd_steps, 4, [one_step(make, corpus, layout) for layout in four])
    two = [layout for layout in FP32 + BF16 if layout.ranks == 2]
    return {layout: [rank.sgd[index] for rank in two_ranks] for index, layout in enumerate(two)} | {
        layout: [rank[index] for rank in four_ranks] for index, layout in enumerate(four)
    }


class Expected(NamedTuple):
    """The step by the fp64 reference."""

    gradients: dict[str, Tensor]
    loss: float
    group_grad_norms: dict[str, float]
    grad_norm: float


@pytest.fixture(scope="module")
def expected(make: MakeRun, corpus: Path) -> Expected:
    config = one_step(make, corpus, Layout(1, 1, 4))
    gradients, loss, _ = reference_gradients(config)
    table = parameter_table(build_model(config.model, config.mup), config.model, config.mup)
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        group = table[name].group
        squares[group] = squares.get(group, 0.0) + float(gradient.square().sum())
    norms = {group: math.sqrt(square) for group, square in squares.items()}
    return Expected(gradients, loss, norms, math.hypot(*norms.values()))


@pytest.mark.parametrize("layout", FP32, ids=str)
def test_replicas_give_the_gradient_of_the_whole_batch(
    steps: Steps, expected: Expected, layout: Layout
) -> None:
    step = steps[layout][0]
    assert step.gradients.keys() == expected.gradients.keys()
    assert worst_error(step.gradients, expected.gradients) < 2e-5
    assert step.loss == pytest.approx(expected.loss, rel=1e-6)
    assert step.group_grad_norms == pytest.approx(expected.group_grad_norms, rel=1e-5)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize("layout", BF16, ids=str)
def test_replicas_give_the_gradient_norm_in_bf16(
    steps: Steps, expected: Expected, layout: Layout
) -> None:
    """DeepSpeed has lost and doubled micro-batches in bf16; the norm shows either."""
    assert steps[layout][0].grad_norm == pytest.approx(expected.grad_norm, rel=0.02)


def test_all_ranks_of_all_layouts_agree_on_batch_loss_and_norm(
    make: MakeRun, corpus: Path, steps: Steps
) -> None:
    (single,) = sgd_steps([one_step(make, corpus, Layout(1, 1, 4))])
    assert {step.digest for ranks in steps.values() for step in ranks} == {single.digest}
    for layout, ranks in steps.items():
        assert len(ranks) == layout.ranks
        assert len({(step.loss, step.grad_norm) for step in ranks}) == 1


def test_a_boundary_fraction_of_the_own_tokens_misses_the_reference(
    two_ranks: list[Results], expected: Expected
) -> None:
    """Negative control: what the parity tests must be able to see."""
    assert worst_error(two_ranks[0].control.gradients, expected.gradients) > 1e-2


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_bad_loss_on_one_rank_stops_all_with_the_same_error(
    two_ranks: list[Results], zero_stage: int
) -> None:
    errors = [rank.bad_loss[zero_stage] for rank in two_ranks]
    assert errors[0][0] == errors[1][0] and "step 2: loss nan" in errors[0][0]
    assert [changed for _, changed in errors] == [[], []]


@pytest.mark.parametrize("index", [0, 1], ids=["stage 1", "stage 3"])
def test_an_odd_number_of_evaluation_batches_is_shared_by_two_ranks(
    make: MakeRun, two_ranks: list[Results], index: int
) -> None:
    """Under stage 3 each layer would wait for the other rank, which has one batch less."""
    single = evaluation_row(evaluated(make, 1))
    by_position = single.pop("loss_by_position")
    for rank in two_ranks:
        row = dict(rank.evaluation[index])
        positions = zip(row.pop("loss_by_position"), by_position, strict=True)
        assert all(own == (one and pytest.approx(one, rel=1e-6)) for own, one in positions)
        assert row.keys() == single.keys()
        for key, value in single.items():
            assert row[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("index", range(len(SAVED)), ids=lambda index: str(SAVED[index]))
def test_two_ranks_continue_what_one_has_saved(
    make: MakeRun, one_rank: dict[str, LayoutStep], two_ranks: list[Results], index: int
) -> None:
    start = two_ranks[0].starting[index]
    check_continued(checkpointed(make, "one_rank", *SAVED[index]), start, one_rank[SAVED[index][0]])


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("index", range(len(SAVED)), ids=lambda index: str(SAVED[index]))
def test_one_rank_continues_what_two_have_saved(
    make: MakeRun, two_ranks: list[Results], index: int, zero_stage: int
) -> None:
    precision, writers_stage = SAVED[index]
    if precision == "bf16":
        zero_stage = max(zero_stage, 1)
    config = checkpointed(make, f"stage_{writers_stage}", precision, zero_stage)
    check_continued(config, start_again(config), two_ranks[0].saving[index])


def check_continued(config: RunConfig, start: Start, uninterrupted: LayoutStep) -> None:
    """Each number of the checkpoint has arrived, and the next step is the uninterrupted one."""
    model, optimizer, description = load_tensors(newest_folder(config.output_dir))
    assert any(name.endswith("exp_avg_sq") for name in optimizer)
    for saved, read in ((model, start.model), (optimizer, start.optimizer)):
        assert saved.keys() == read.keys()
        assert [name for name in saved if not torch.equal(saved[name], read[name])] == []
    state = description["train_state"]
    assert state["step"] == SAVED_STEPS and start.state.to_dict() == state | {"restart_count": 1}
    step, rel = start.next_step, 1e-5 if config.training.precision == "fp32" else 1e-2
    assert step.digest == uninterrupted.digest
    assert step.loss == pytest.approx(uninterrupted.loss, rel=rel)
    assert step.grad_norm == pytest.approx(uninterrupted.grad_norm, rel=2 * rel)


def test_a_whole_run_on_two_ranks_is_that_of_one(make: MakeRun, two_ranks: list[Results]) -> None:
    assert [rank.exit_code for rank in two_ranks] == [0, 0]
    single = whole_run(make, "run_of_one", zero_stage=1)
    assert pretrain.run(single) == 0
    folder = Path(whole_run(make, "run_of_two", zero_stage=3).output_dir)
    rows, expected = read_rows(folder), read_rows(Path(single.output_dir))
    digests = [[row.get("batch_digest") for row in found] for found in (rows, expected)]
    assert digests[0] == digests[1] and len(set(digests[0])) > 5
    assert [row["world_size"] for row in rows if "loss" in row] == [2] * 8
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert rows[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-3)
    logs = {path.name: path.read_text("utf-8") for path in (folder / "logs").iterdir()}
    assert sorted(logs) == ["rank_0000.log", "rank_0001.log"]
    assert not any("WARNING" in text or "Traceback" in text for text in logs.values())
