"""Wrong slices and wrong copies are caught, each by what is there to catch it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError
from megadlcm.checkpoint import slices
from megadlcm.checkpoint.folder import Checkpoint, open_checkpoint, storage_of
from megadlcm.checkpoint.index import Piece, Range
from megadlcm.checkpoint.load import DamageError, load
from megadlcm.checkpoint.reading import ReadJob, jobs_for
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import MasterPart, master_parts
from megadlcm.engine.state import TrainState
from tests.support.distributed import run_distributed
from tests.support.layouts import no_parameter_is_too_small_to_be_partitioned, run_steps
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine, tiny_run

pytestmark = pytest.mark.slow


def without_clip(engine: TrainingEngine) -> Iterator[MasterPart]:
    """Stage 3 as if every replica had as much of each tensor."""
    for part in master_parts(engine):
        parameter: Any = dict(engine.model.named_parameters())[part.name]
        size = parameter.partition_numel()
        yield replace(part, start=size * engine.mesh.data_parallel_rank, stop=part.start + size)


def everything(engine: TrainingEngine, share: bool) -> list[slices.Slice]:
    """As if nobody shared anything out."""
    del share
    return slices.own_slices(engine, share=False)


def at_the_beginning(spec: Any, mesh: Any) -> Piece:
    """As if every tensor parallel process had the first piece."""
    piece = slices_piece_of(spec, mesh)
    return Piece((0,) * len(piece.offset), piece.shape)


def of_another_tensor(
    checkpoint: Checkpoint, wanted: Range, key: str, target: Any
) -> list[ReadJob]:
    """As if keys lay where queries do, which have the same shape."""
    other = replace(wanted, tensor=wanted.tensor.replace(".attention.wk.", ".attention.wq."))
    return jobs_for(checkpoint, other, key, target)


slices_piece_of = slices.piece_of


def outcome(config: RunConfig) -> str:
    """Saves, opens and loads; what is found wrong."""
    engine, state = tiny_engine(config), TrainState()
    run_steps(engine, config, state, 1)
    try:
        save_checkpoint(engine, config, state)
        storage = storage_of(config)
        checkpoint = open_checkpoint(storage, storage.names()[0])
        load(engine, checkpoint)
    except (InputError, DamageError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def all_outcomes(odd: RunConfig, cut: RunConfig) -> dict[str, str]:
    found = {}
    with no_parameter_is_too_small_to_be_partitioned():
        found["nothing wrong"] = outcome(odd) + outcome(cut)
        for name, config, target, mutant in (
            ("clip", odd, "megadlcm.checkpoint.slices.master_parts", without_clip),
            ("share", odd, "megadlcm.checkpoint.save.own_slices", everything),
            ("offset", cut, "megadlcm.checkpoint.slices.piece_of", at_the_beginning),
            ("tensor", cut, "megadlcm.checkpoint.load.jobs_for", of_another_tensor),
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(target, mutant)
                found[name] = outcome(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megadlcm.checkpoint.load.jobs_for", of_another_tensor)
            patch.setattr("megadlcm.checkpoint.load._compare", lambda *_: None)
            found["tensor, fingerprints ignored"] = outcome(cut)
    return found


def test_each_mutant_is_caught_by_what_is_there_for_it(corpus: Path, tmp_path: Path) -> None:
    widths = {"token_heads": 2, "token_kv_heads": 2, "concept_heads": 2, "concept_kv_heads": 2}
    odd_widths = {
        "d_token": 22, "d_concept": 26, "token_heads": 1, "token_kv_heads": 1, "concept_heads": 1,
        "concept_kv_heads": 1, "token_ffn_size": 37, "concept_ffn_size": 51,
    }  # fmt: skip
    training = {"global_batch_size": 4, "micro_batch_size": 1}
    odd = tiny_run(
        corpus, tmp_path / "odd", model=odd_widths, parallel={"zero_stage": 3}, training=training
    )
    cut = tiny_run(
        corpus, tmp_path / "cut", model=widths, parallel={"tensor_parallel_size": 2},
        training=training,
    )  # fmt: skip
    found = run_distributed(all_outcomes, 4, odd, cut)[0]
    assert found.pop("nothing wrong") == ""
    # the one that nothing else sees
    assert found.pop("tensor, fingerprints ignored") == ""
    assert "fingerprints differ of" in found.pop("tensor")
    assert all(found.values()), found
