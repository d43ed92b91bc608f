"""What the speed benchmark compares is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.equal_flops import dense_with_equal_flops
from benchmarks.throughput import BareLoop
from megadlcm.config import load_config
from megadlcm.model import DLCM
from megadlcm.parallel.process_group import join_process_group
from megadlcm.plan.accounting import flops_per_token
from megadlcm.run_folder.rows import read_rows
from megadlcm.training.pretrain import open_trainer
from tests.support.paths import CONFIGS
from tests.support.tiny_runs import step_loader, tiny_run, write_corpus


@pytest.mark.parametrize("name", ["quickstart.yaml", "dlcm_87m.yaml", "dlcm_2.3b.yaml"])
def test_the_dense_control_costs_what_the_concept_model_costs(name: str) -> None:
    config = load_config(CONFIGS / name)
    dense = dense_with_equal_flops(config.model, config.data.seq_len)
    assert dense.architecture == "dense" and dense.num_layers == config.model.num_layers
    wanted, found = (
        flops_per_token(model, config.data.seq_len)["total"] for model in (config.model, dense)
    )
    assert found == pytest.approx(wanted, rel=0.01)


def test_the_bare_loop_takes_the_steps_of_the_trainer(tmp_path: Path) -> None:
    """Same losses, same concepts: only then is the time of one worth comparing with the other."""
    config = tiny_run(
        write_corpus(tmp_path),
        tmp_path / "run",
        training={"train_steps": 6, "global_batch_size": 4, "micro_batch_size": 4},
        optimizer={"learning_rate": 1e-2},
        schedule={"warmup_steps": 0, "decay_fraction": 0.0},
    )
    mesh = join_process_group()
    with open_trainer(config, mesh) as trainer:
        trainer.train_one()
        assert isinstance(trainer.engine.model, DLCM)
        offset = float(trainer.engine.model.boundary_detector.offset)
        bare, loader = BareLoop(config, mesh, offset), step_loader(config)
        summaries = [bare.run(next(loader)) for _ in range(5)]
        loader.close()
        for _ in range(4):
            trainer.train_one()
    rows = read_rows(Path(config.output_dir))
    assert [row["loss"] for row in rows] == pytest.approx([s.loss for s in summaries], rel=1e-5)
    fractions = [summary.boundary_fraction for summary in summaries]
    assert [row["boundary_fraction"] for row in rows] == pytest.approx(fractions)
    assert len(set(fractions)) > 1 and rows[-1]["loss"] < rows[0]["loss"] - 0.01
    rates = [row["boundary_step_size"] for row in rows]
    assert max(rates) > 0.0  # the detector moves in both; a loop that forgot it would drift away
