"""A run may change its layout between starts, and evaluates alike on each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megadlcm.config import RunConfig
from megadlcm.parallel import pipeline
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from megadlcm.training.checkpoint import load_model
from tests.support.distributed import run_distributed
from tests.support.layouts import LayoutStep, Start, evaluation_row, save_and_go_on, start_again
from tests.support.parity import Layout
from tests.support.tiny_runs import tiny_run

pytestmark = pytest.mark.slow

ALONE = Layout(zero_stage=1)
MANY = {
    "tensor_pipeline": Layout(2, 2, 1, sequence=True),
    "folded": Layout(1, 4, 0, placement="folded"),
    "tensor_zero_3": Layout(2, 1, 3),
    "half": Layout(2, 2, 1, precision="bf16"),
}
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Function(folder name, layout) -> AdamW run whose model can be cut in four."""
    root = tmp_path_factory.mktemp("layout_changes")

    def make_run(folder: str, layout: Layout) -> RunConfig:
        return tiny_run(
            corpus,
            root / folder,
            model={
                "token_heads": 4,
                "token_kv_heads": 4,
                "concept_heads": 4,
                "concept_kv_heads": 4,
                "backbone_layers": 3,
            },
            parallel=layout.keys(),
            training={"train_steps": 4, "global_batch_size": 4, "micro_batch_size": 1}
            | {"precision": layout.precision},
            evaluation={"batch_tokens": 64},
        )

    return make_run


@dataclass(frozen=True)
class Results:
    """What came of it on one rank."""

    saved: list[LayoutStep]
    started: list[Start]
    evaluated: list[dict[str, Any]]
    exit_codes: list[int]


def run_all(
    saving: list[RunConfig],
    starting: list[RunConfig],
    evaluating: list[RunConfig],
    running: list[RunConfig],
) -> Results:
    """Everything in one launch; evaluations in several groups of micro-batches."""
    saved = [save_and_go_on(config) for config in saving]
    started = [start_again(config) for config in starting]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_FORWARD_GROUP", 1)
        evaluated = [evaluation_row(config) for config in evaluating]
    return Results(
        saved,
        started,
        evaluated,
        [pretrain.run(config) for config in running],
    )


@pytest.fixture(scope="module")
def alone(make: Make) -> Results:
    """One process: saves for the others, and what they are compared with."""
    half = ALONE._replace(precision="bf16")
    return run_distributed(
        run_all,
        1,
        [make("from_one", ALONE), make("from_one_half", half)],
        [],
        [make("evaluated", ALONE)],
        [make("run_alone", ALONE)],
    )[0]


@pytest.fixture(scope="module")
def many(make: Make, alone: Results) -> list[Results]:
    """Four processes."""
    assert alone.saved
    return run_distributed(
        run_all,
        4,
        [make(f"from_{name}", layout) for name, layout in MANY.items()],
        [
            make("from_one_half" if layout.precision == "bf16" else "from_one", layout)
            for layout in MANY.values()
        ],
        [make("evaluated", layout) for layout in MANY.values()],
        [make(f"run_{name}", layout) for name, layout in MANY.items()],
    )


@pytest.mark.parametrize("name", sorted(MANY))
def test_many_continue_what_one_saved(name: str, alone: Results, many: list[Results]) -> None:
    index, half = list(MANY).index(name), MANY[name].precision == "bf16"
    expected = alone.saved[1 if half else 0]
    for rank in many:
        found = rank.started[index].next_step
        # known to those that read the data
        assert found.digest == expected.digest or (found.digest == "" and rank is not many[0])
        assert found.loss == pytest.approx(expected.loss, rel=2e-3 if half else 1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=5e-2 if half else 1e-4)


@pytest.mark.parametrize("name", sorted(MANY))
def test_one_continues_what_many_saved(name: str, make: Make, many: list[Results]) -> None:
    half = MANY[name].precision == "bf16"
    layout = ALONE._replace(precision=MANY[name].precision)
    (start,) = run_distributed(start_again, 1, make(f"from_{name}", layout))
    expected = many[0].saved[list(MANY).index(name)]
    assert start.next_step.digest == expected.digest
    assert start.next_step.loss == pytest.approx(expected.loss, rel=2e-3 if half else 1e-5)
    assert len(start.optimizer) > len(start.model)


@pytest.mark.parametrize("name", sorted(MANY))
def test_every_layout_evaluates_alike(name: str, alone: Results, many: list[Results]) -> None:
    half = MANY[name].precision == "bf16"
    expected = alone.evaluated[0]
    for rank in many:
        found = rank.evaluated[list(MANY).index(name)]
        assert found["eval_tokens"] == expected["eval_tokens"]
        assert found["eval_loss"] == pytest.approx(
            expected["eval_loss"], rel=5e-3 if half else 1e-5
        )
        if not half:
            assert found["tokens_per_concept"] == pytest.approx(expected["tokens_per_concept"])
            assert long_enough(found) == pytest.approx(long_enough(expected), rel=1e-5)


def long_enough(row: dict[str, Any]) -> dict[int, float]:
    """Losses by position inside a concept, where some concept is so long."""
    losses = enumerate(row["loss_by_position"])
    return {position: loss for position, loss in losses if loss is not None}


@pytest.mark.parametrize("name", sorted(MANY))
def test_a_whole_run_leaves_what_a_run_of_one_leaves(
    name: str, make: Make, alone: Results, many: list[Results]
) -> None:
    """Calibration, causality check, metrics, samples, checkpoints and the loaded model."""
    assert alone.exit_codes == [0] and {code for rank in many for code in rank.exit_codes} == {0}
    config, single = make(f"run_{name}", MANY[name]), make("run_alone", ALONE)
    rows, expected = (list(read_rows(Path(run.output_dir))) for run in (config, single))
    half = MANY[name].precision == "bf16"
    assert len(rows) == len(expected) > 4
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        if "loss" in row:
            assert row["batch_digest"] == other["batch_digest"]
            assert row["learning_rate"].keys() == other["learning_rate"].keys()
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-2 if half else 1e-4)
    samples = [sorted(Path(run.output_dir).glob("samples/*")) for run in (config, single)]
    assert [path.name for path in samples[0]] == [path.name for path in samples[1]] != []
    models = [load_model(run.output_dir).state_dict() for run in (config, single)]
    assert models[0].keys() == models[1].keys()
    if not half:
        for key, value in models[1].items():
            assert torch.allclose(models[0][key], value, rtol=1e-2, atol=1e-3), key
