"""The units of a model: what is printed, in which order, and what each is made of."""

from __future__ import annotations

import pytest

from megadlcm.config.anatomy import Stream, UnitId, UnitKind, unit_ids
from tests.support.tiny_models import tiny_config


def test_a_dlcm_goes_from_tokens_to_concepts_and_back() -> None:
    model = tiny_config(encoder_layers=2, backbone_layers=1, decoder_layers=2)
    assert [unit.name for unit in unit_ids(model)] == [
        "token_embedding",
        "encoder.0",
        "encoder.1",
        "segmentation",
        "backbone.0",
        "concept_reader",
        "decoder.0",
        "decoder.1",
        "lm_head",
    ]
    concepts = [unit.name for unit in unit_ids(model) if unit.kind.stream is Stream.CONCEPTS]
    assert concepts == ["segmentation", "backbone.0"]


def test_the_dense_control_has_one_stack() -> None:
    model = tiny_config(architecture="dense", encoder_layers=1, backbone_layers=1, decoder_layers=1)
    assert [unit.name for unit in unit_ids(model)] == [
        "token_embedding",
        "decoder.0",
        "decoder.1",
        "decoder.2",
        "lm_head",
    ]


@pytest.mark.parametrize("architecture", ["dlcm", "dense"])
def test_blocks_are_numbered_and_all_others_exist_once(architecture: str) -> None:
    ids = unit_ids(tiny_config(architecture=architecture))
    assert len(set(ids)) == len(ids)
    for unit in ids:
        assert (unit.index is not None) == unit.kind.is_block
    single = [unit.kind for unit in ids if not unit.kind.is_block]
    assert len(set(single)) == len(single)
    assert UnitId(UnitKind.LM_HEAD) == ids[-1]
