"""Resuming on other training data: refused, or a phase of its own that the checkpoint tells of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.shard_format.index import read_index
from megadlcm.config import RunConfig
from megadlcm.engine.state import TrainState
from tests.support.checkpoints import start_again, train
from tests.support.layouts import run_steps
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine

MakeRun = Callable[..., RunConfig]


def test_shards_may_move_but_not_change(make_run: MakeRun, corpus: Path, tmp_path: Path) -> None:
    train(make_run(), 1, save_at=(1,))
    moved = tmp_path / "moved"
    shutil.copytree(corpus / "train", moved)
    start_again(make_run(data={"train": [{"path": str(moved), "name": "train"}]}))
    with pytest.raises(InputError, match=r"data\.train has changed .*train: other shards"):
        start_again(make_run(data={"train": [{"path": str(corpus / "valid"), "name": "train"}]}))
    heavier = [{"path": str(corpus / "train"), "name": "train", "weight": 2.0}]
    with pytest.raises(InputError, match=r"data\.train has changed .*train: weight 1 -> 2"):
        start_again(make_run(data={"train": heavier}))


def test_other_texts_of_the_same_size_are_other_shards(
    make_run: MakeRun, corpus: Path, tmp_path: Path
) -> None:
    """Counts alone would not tell a corpus from itself in another order."""
    train(make_run(), 1, save_at=(1,))
    texts = (corpus / "train.jsonl").read_text().splitlines(keepends=True)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(texts)))
    folder = tmp_path / "backwards"
    prepare(PrepareOptions((str(backwards),), corpus / "tokenizer.json", folder))
    assert read_index(folder).num_tokens == read_index(corpus / "train").num_tokens
    with pytest.raises(InputError, match="train: other shards"):
        start_again(make_run(data={"train": [{"path": str(folder), "name": "train"}]}))


def test_a_new_phase_is_recorded_and_goes_on(make_run: MakeRun, corpus: Path) -> None:
    """Asked for once, it stays; sources go on where they were; a checkpoint tells of it."""
    config = make_run()
    train(config, 2, save_at=(2,))
    both = [
        {"path": str(corpus / "train"), "name": "train"},
        {"path": str(corpus / "valid"), "name": "more"},
    ]
    changed = make_run(data={"train": both, "new_phase": True})
    engine, state = start_again(changed)
    batch_size = config.training.global_batch_size
    assert [phase["first_sample"] for phase in state.data_phases] == [0, 2 * batch_size]
    turns = [source["first_turn"] for source in state.data_phases[1]["sources"]]
    assert turns == [2 * batch_size, 0]
    expected = run_steps(engine, changed, state, 2)
    save_checkpoint(engine, changed, state)
    calm = make_run(data={"train": both})
    again, resumed = start_again(calm)
    assert resumed.data_phases == state.data_phases
    assert resumed.step == 4 and expected[0].digest != expected[1].digest
    with pytest.raises(InputError, match="more: gone"):
        start_again(config)
    run_steps(again, calm, resumed, 1)


def test_a_checkpoint_without_phases_is_of_another_order(make_run: MakeRun) -> None:
    """Earlier versions mixed sources in another order: to go on would repeat and lose samples."""
    config = make_run()
    engine, state = tiny_engine(config), TrainState()
    run_steps(engine, config, state, 1)
    save_checkpoint(engine, config, state)
    with pytest.raises(InputError, match="earlier version"):
        start_again(config)
