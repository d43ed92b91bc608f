"""One semantics, any layout: losses, every gradient and every parameter equal one process's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadlcm.config import RunConfig
from megadlcm.engine.objective import Objective
from megadlcm.parallel import collectives
from megadlcm.parallel.messages import Message
from megadlcm.parallel.pipeline import Pipeline
from tests.support.distributed import run_distributed
from tests.support.parity import (
    Difference,
    Layout,
    Trace,
    all_layouts,
    compare,
    parity_run,
    relative,
    trace,
    traces,
    write_uneven,
)
from tests.support.tiny_runs import write_corpus

pytestmark = pytest.mark.slow(40)

TOLERANCE = 1e-5
EIGHT = [
    Layout(2, 2, 1, sequence=True, recompute="block"),
    Layout(2, 2, 0, recompute="selective", placement="folded"),
    Layout(4, 2, 1, sequence=True, placement="folded"),
    Layout(2, 4, 1, recompute="block"),
    Layout(1, 8, 0),
    Layout(1, 4, 1, placement="folded"),
    Layout(4, 1, 3, sequence=True),
    Layout(2, 1, 2),
    Layout(1, 1, 3),
]
SPLITS = [
    Layout(1, 2, micro=2),
    Layout(1, 4, micro=8, placement="folded"),
    Layout(2, 2, micro=4, sequence=True),
    Layout(2, 1, 2, micro=4),
    Layout(4, 1, micro=8, sequence=True),
]
MODELS: dict[str, dict[str, Any]] = {
    "R=2": {"target_tokens_per_concept": 2.0},
    "R=8": {"target_tokens_per_concept": 8.0},
    "dense": {"architecture": "dense", "decoder_layers": 2},
    "ema_ste": {"boundary_mode": "ema_ste"},
    "learned_local": {"boundary_mode": "learned_local"},
    "rule": {"boundary_mode": "rule"},
    "fixed": {"boundary_mode": "fixed"},
    "start_shift": {"segment_align": "start_shift", "concept_weighting": "uniform"},
}
FEW = [
    Layout(2, 2, 1, sequence=True),
    Layout(1, 4, 0, placement="folded"),
    Layout(4, 1, 2),
    Layout(2, 1, 3, sequence=True, recompute="selective"),
]
HALF = [
    Layout(zero_stage, pipeline_zero, 1, sequence=zero_stage > 1, precision="bf16")
    for zero_stage, pipeline_zero in ((2, 2), (1, 4), (4, 1))
] + [Layout(2, 1, 2, precision="bf16"), Layout(1, 1, 3, precision="bf16")]
"""bf16 with fp32 sums."""

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Function(layout, **model) -> config."""
    folder = tmp_path_factory.mktemp("parity")
    corpus = folder / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    write_uneven(corpus)

    def make_run(layout: Layout, **model: Any) -> RunConfig:
        return parity_run(corpus, folder / "run", layout, **model)

    return make_run


@pytest.fixture(scope="module")
def alone(make: Make) -> Trace:
    """The run of one process that others are compared with."""
    (result,) = run_distributed(trace, 1, make(Layout()))
    return result


def agrees(found: list[Trace], expected: Trace, tolerance: float = TOLERANCE) -> Difference:
    """Checks the trace of every rank; the largest differences, from rank 0."""
    assert found[0].digests == expected.digests
    for rank in found:
        # known to those that read the data
        assert rank.digests in (expected.digests, [""] * len(expected.digests))
        assert rank.losses == found[0].losses and rank.grad_norms == found[0].grad_norms
        assert rank.fractions == pytest.approx(expected.fractions, rel=1e-12)
    difference = compare(found[0], expected)
    assert max(difference) < tolerance, difference
    for own, other in zip(found[0].group_norms, expected.group_norms, strict=True):
        assert own == pytest.approx(other, rel=tolerance)
    return difference


def test_the_reference_is_not_vacuous(alone: Trace) -> None:
    """Concept counts differ tenfold, every parameter has a gradient, clipping and decay act."""
    assert max(alone.concepts) >= 10 * min(alone.concepts)
    assert all(float(g.norm()) > 1e-8 for step in alone.gradients for g in step.values())
    assert all(norm > 0.5 for norm in alone.grad_norms)  # the limit of the runs
    assert len(set(alone.losses)) == len(alone.losses) > 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_computes_what_one_process_computes(
    world_size: int, make: Make, alone: Trace
) -> None:
    # micro-batches of two windows on four processes: half of the messages, which take the time
    micro = 2 if world_size == 4 else 1
    layouts = [layout._replace(micro=micro) for layout in all_layouts(world_size)]
    assert len(layouts) == {1: 12, 2: 48, 4: 108}[world_size]
    ranks = run_distributed(
        traces, world_size, [make(layout) for layout in layouts], timeout_seconds=900
    )
    for index, layout in enumerate(layouts):
        difference = agrees([rank[index] for rank in ranks], alone)
        # a layout that was not really used would be bit-equal to the reference
        if layout.tensor > 1 or layout.tensor * layout.pipeline < world_size:
            assert difference.gradient > 0.0
        if layout.pipeline > 1:
            assert any(rank[index].sent for rank in ranks)


def test_a_sample_of_layouts_of_eight_computes_the_same(make: Make, alone: Trace) -> None:
    ranks = run_distributed(traces, 8, [make(layout) for layout in EIGHT], timeout_seconds=600)
    for index in range(len(EIGHT)):
        agrees([rank[index] for rank in ranks], alone)


def test_any_split_into_micro_batches_computes_the_same(make: Make, alone: Trace) -> None:
    """On interpreters of their own: every set there has another order, as in a real run."""
    ranks = run_distributed(traces, 4, [make(layout) for layout in SPLITS], fresh=True)
    for index in range(len(SPLITS)):
        agrees([rank[index] for rank in ranks], alone)


def test_every_kind_of_model_computes_the_same(make: Make) -> None:
    references = run_distributed(traces, 1, [make(Layout(), **m) for m in MODELS.values()])[0]
    configs = [make(layout, **model) for model in MODELS.values() for layout in FEW]
    ranks = run_distributed(traces, 4, configs, timeout_seconds=600)
    assert references[0].fractions != references[1].fractions
    for index in range(len(configs)):
        agrees([rank[index] for rank in ranks], references[index // len(FEW)])


def test_half_precision_stays_within_its_rounding(make: Make) -> None:
    """bf16 rounds partial sums, so cut layers differ: losses by 2e-5, the gradient by 2e-3.

    Only the sums of cut layers are rounded otherwise: replicas and stages add in fp32.
    """
    (reference,) = run_distributed(trace, 1, make(Layout(zero_stage=1, precision="bf16")))
    ranks = run_distributed(traces, 4, [make(layout) for layout in HALF])
    for index in range(len(HALF)):
        found = ranks[0][index]
        difference = compare(found, reference)
        assert difference.loss < 2e-5, (HALF[index], difference)
        assert difference.norm < 5e-4, (HALF[index], difference)
        assert difference.parameter < 1e-3, (HALF[index], difference)
        whole = relative(
            torch.cat([g.flatten() for g in found.gradients[0].values()]),
            torch.cat([g.flatten() for g in reference.gradients[0].values()]),
        )
        assert whole < 2e-3, (HALF[index], whole)


def wrong_scale(config: RunConfig) -> Trace:
    """Gradients of the head's loss that are too large by the number of replicas."""
    exact = Objective.__call__

    def scaled(self: Objective, *arguments: Any) -> Any:
        result = exact(self, *arguments)
        return result._replace(loss=result.loss * self.mesh.data_parallel_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", scaled)
        return trace(config)


def missing_reduction(config: RunConfig) -> Trace:
    """Gradients that are not summed where one tensor enters several cut layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            collectives.CopyToLayer, "backward", staticmethod(lambda _, gradient: (gradient, None))
        )
        return trace(config)


def missing_gains(config: RunConfig) -> Trace:
    """Gains of heads whose gradient is only that of this process's heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megadlcm.parallel.partition.is_summand", lambda *_: False)
        return trace(config)


def foreign_concepts(config: RunConfig) -> Trace:
    """A stage that gets concept states of the micro-batch before, where the shapes allow it."""
    exact = Pipeline._receive
    last: dict[str, torch.Tensor] = {}

    def swapped(self: Pipeline, message: Message) -> torch.Tensor:
        tensor = exact(self, message)
        if message.name != "states":
            return tensor
        before, last["states"] = last.get("states", tensor), tensor
        rows = min(len(before), len(tensor))
        return torch.cat([before[:rows], tensor[rows:]]).detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "_receive", swapped)
        return trace(config)


def run_mistakes(configs: dict[str, RunConfig]) -> dict[str, Trace]:
    """Every mistake in one launch."""
    return {name: globals()[name](config) for name, config in configs.items()}


def test_mistakes_are_caught(make: Make, alone: Trace) -> None:
    """The comparisons above are not vacuous: each of these differs by far more than they allow."""
    mistakes = {
        "wrong_scale": Layout(2, 1),
        "missing_reduction": Layout(2, 2),
        "missing_gains": Layout(2, 1),
        "foreign_concepts": Layout(1, 4),
    }
    configs = {}
    for name, layout in mistakes.items():
        config = make(layout)
        # states that are wrong may also move a decision, which the check would find before us
        unchecked = replace(config.parallel, check_agreement=False)
        configs[name] = replace(config, parallel=unchecked)
    found = run_distributed(run_mistakes, 4, configs)[0]
    for name in mistakes:
        difference = compare(found[name], alone)
        assert difference.gradient > 1e-2, (name, difference)
        assert difference.gradient > 1000 * TOLERANCE


def disagree(config: RunConfig) -> str:
    """What happens when one process of a tensor parallel group sees other hidden states."""
    from megadlcm.model.boundary_detector import BoundaryDetector
    from megadlcm.parallel.tensor import DisagreementError

    exact = BoundaryDetector.cosine

    def perturbed(self: BoundaryDetector, hidden_TD: torch.Tensor) -> torch.Tensor:
        cosine_T = exact(self, hidden_TD)
        return -cosine_T if dist.get_rank() == 1 else cosine_T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundaryDetector, "cosine", perturbed)
        try:
            trace(config)
        except DisagreementError as error:
            return str(error)
    return "agreed"


def disagree_with_and_without_the_check(configs: list[RunConfig]) -> list[str]:
    """The same on several configs."""
    return [disagree(config) for config in configs]


def test_a_process_that_decides_otherwise_is_overruled_and_named_when_asked(make: Make) -> None:
    """Without the check the run goes on with equal shapes: the first process decides for all."""
    checked = make(Layout(2))
    parallel = dict(Layout(2).keys(), check_agreement=False)

    unchecked = replace(checked, parallel=replace(checked.parallel, check_agreement=False))
    assert parallel["check_agreement"] is False and checked.parallel.check_agreement
    ranks = run_distributed(disagree_with_and_without_the_check, 2, [unchecked, checked])
    for went_on, named in ranks:
        assert went_on == "agreed"
        assert "rank 1" in named and "differ from rank 0" in named
