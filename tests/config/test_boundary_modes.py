"""Each mode is one row of traits that make sense together, and nothing else asks for its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import get_args

from megadlcm.config.boundary_modes import BOUNDARY_MODES, NO_BOUNDARIES, BoundaryMode
from megadlcm.config.kernels import ATTENTION_BACKENDS, AttentionBackend
from megadlcm.config.training import OPTIMIZERS, OptimizerName
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_config

NAMES = {*BOUNDARY_MODES, *ATTENTION_BACKENDS, *OPTIMIZERS}


def compared_strings(tree: ast.AST) -> Iterator[str]:
    """Strings that something is compared with, one by one or in a collection."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_every_name_has_a_row() -> None:
    assert set(get_args(BoundaryMode)) == set(BOUNDARY_MODES)
    assert set(get_args(AttentionBackend)) == {"auto", *ATTENTION_BACKENDS}
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


def test_no_source_asks_for_the_name_of_a_mode_a_back_end_or_an_optimizer() -> None:
    sources = sorted((ROOT / "megadlcm").rglob("*.py"))
    assert len(sources) > 60
    found = {
        path.name: NAMES & set(compared_strings(ast.parse(path.read_text("utf-8"))))
        for path in sources
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_a_comparison_with_a_name_is_found() -> None:
    for line in ('mode == "rule"', 'x if a and mode not in ("adamw", "b") else y'):
        assert NAMES & set(compared_strings(ast.parse(line)))


def test_traits_fit_together() -> None:
    for name, traits in BOUNDARY_MODES.items():
        scored = traits.decides_by == "score"
        # what is drawn or trained is a score
        assert scored or not (traits.is_sampled or traits.is_learned)
        # a ratio loss needs something that it can train
        assert traits.is_learned or traits.ratio_over is None, name
        if traits.is_steered:
            assert traits.ratio_over is not None and not traits.is_straight_through, name


def test_the_dense_control_has_no_boundaries_whatever_its_mode() -> None:
    for mode in BOUNDARY_MODES:
        assert tiny_config(boundary_mode=mode).boundary is BOUNDARY_MODES[mode]
        dense = tiny_config(architecture="dense", boundary_mode=mode)
        assert dense.boundary is NO_BOUNDARIES
        assert not (dense.calibrates or dense.tracks_threshold or dense.smooths)


def test_every_score_is_thresholded_at_a_tracked_quantile_unless_the_config_says_where() -> None:
    for mode, traits in BOUNDARY_MODES.items():
        config = tiny_config(boundary_mode=mode)
        assert config.tracks_threshold == (traits.decides_by == "score")
        assert config.still_threshold == 0.5
        paper = tiny_config(boundary_mode=mode, track_threshold=False)
        assert paper.tracks_threshold == (config.tracks_threshold and not traits.is_learned)
    # each key is read by the modes that it belongs to
    rule = tiny_config(boundary_mode="rule", rule_threshold=0.4)
    assert not rule.tracks_threshold and rule.still_threshold == 0.4
    learned = tiny_config(rule_threshold=0.4)
    assert learned.tracks_threshold and learned.still_threshold == 0.5


def test_only_a_draw_is_balanced_and_only_on_request() -> None:
    for mode, traits in BOUNDARY_MODES.items():
        assert not tiny_config(boundary_mode=mode).balances_draw
        balanced = tiny_config(boundary_mode=mode, balanced_draw=True)
        assert balanced.balances_draw == traits.is_sampled
