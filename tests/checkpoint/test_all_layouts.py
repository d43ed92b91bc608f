"""Every layout of four processes loads the checkpoint of every other one, bit for bit."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from megadlcm.config import RunConfig
from tests.support.checkpoint_pairs import Pair, load_all, save_all
from tests.support.distributed import run_distributed
from tests.support.parity import Layout
from tests.support.tiny_runs import tiny_run

pytestmark = pytest.mark.slow(60)

EXHAUSTIVE = "MEGADLCM_ALL_LAYOUTS" in os.environ
"""Set it to try all pairs; else those of a few layouts."""

DIVIDING = {"token_heads": 4, "token_kv_heads": 4, "concept_heads": 4, "concept_kv_heads": 4}
ODD = {
    "vocab_size": 301,
    "d_token": 22,
    "d_concept": 26,
    "token_heads": 1,
    "token_kv_heads": 1,
    "concept_heads": 1,
    "concept_kv_heads": 1,
    "token_ffn_size": 37,
    "concept_ffn_size": 51,
}


def layouts(sizes: list[tuple[int, int]]) -> dict[str, Layout]:
    """ZeRO and precision in all ways that a run of four processes may have them."""
    found = {}
    for (tensor, pipeline), zero, precision in itertools.product(sizes, range(4), ("fp32", "bf16")):
        if (pipeline > 1 and zero > 1) or (precision == "bf16" and zero == 0):
            continue
        for placement in ("linear", "folded") if pipeline == 4 else ("linear",):
            name = f"t{tensor} p{pipeline} z{zero} {precision} {placement}"
            found[name] = Layout(
                tensor, pipeline, zero, tensor > 1, placement=placement, precision=precision
            )
    return found


ALL_CUT = layouts([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
ALL_UNCUT = layouts([(1, 1), (1, 2)])
SOME = (
    "t1 p1 z0 fp32 linear",
    "t1 p1 z3 fp32 linear",
    "t1 p1 z2 bf16 linear",
    "t2 p1 z3 bf16 linear",
    "t4 p1 z2 fp32 linear",
    "t1 p2 z1 bf16 linear",
    "t2 p2 z1 fp32 linear",
    "t1 p4 z0 fp32 folded",
)
"""In which each stage of ZeRO and each axis meets others; all of them take minutes more."""
CUT = ALL_CUT if EXHAUSTIVE else {name: ALL_CUT[name] for name in SOME}
UNCUT = ALL_UNCUT if EXHAUSTIVE else {k: v for k, v in ALL_UNCUT.items() if k in SOME[:4]}
WITH_STEP = tuple(name for name in SOME if "fp32" in name)


def runs(
    corpus: Path, root: Path, model: dict[str, Any], chosen: dict[str, Layout]
) -> dict[str, RunConfig]:
    return {
        name: tiny_run(
            corpus,
            root / name.replace(" ", "_"),
            model=model | {"backbone_layers": 3},
            parallel=layout.keys(),
            training={"global_batch_size": 4, "micro_batch_size": 1, "precision": layout.precision},
        )
        for name, layout in chosen.items()
    }


def all_pairs(
    cut: dict[str, RunConfig], uncut: dict[str, RunConfig]
) -> list[dict[tuple[str, str], Pair]]:
    """Pairs of layouts whose widths divide, of the others, and of a few with a step after it."""
    found, saved = [], []
    for configs in (cut, uncut):
        saved.append(save_all(configs))
        found.append(load_all(configs, configs, saved[-1], steps=0))
    few = {name: config for name, config in cut.items() if name in WITH_STEP}
    found.append(load_all(few, few, saved[0], steps=1))
    return found


@pytest.fixture(scope="module")
def results(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[tuple[str, str], Pair]]]:
    """By rank, then by group of layouts."""
    root = tmp_path_factory.mktemp("all_layouts")
    cut = runs(corpus, root / "cut", DIVIDING, CUT)
    uncut = runs(corpus, root / "uncut", ODD, UNCUT)
    return run_distributed(all_pairs, 4, cut, uncut, timeout_seconds=900)


def test_every_pair_is_bit_equal(results: list[list[dict[tuple[str, str], Pair]]]) -> None:
    """On each process: masters, moments, buffers, and the parameters that it computes with."""
    for own in results:
        for found, chosen in zip(own, (CUT, UNCUT, WITH_STEP), strict=True):
            assert len(found) == len(chosen) ** 2
            assert {pair: one.unequal for pair, one in found.items() if one.unequal} == {}


def test_the_next_step_has_the_same_loss(results: list[list[dict[tuple[str, str], Pair]]]) -> None:
    pairs = results[0][2]
    for source in WITH_STEP:
        losses = [pairs[source, target].loss for target in WITH_STEP if "fp32" in target]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert len({pairs[source, WITH_STEP[0]].loss for source in WITH_STEP}) > 1


def test_little_more_is_read_than_is_needed(
    results: list[list[dict[tuple[str, str], Pair]]],
) -> None:
    """Blocks are read whole, and these files have less than one: what counts is what is asked."""
    for group, chosen in enumerate((CUT, UNCUT)):
        for source, target in itertools.product(chosen, chosen):
            wanted = sum(own[group][source, target].wanted for own in results)
            own_wanted = sum(own[group][target, target].wanted for own in results)
            assert wanted == own_wanted > 0
