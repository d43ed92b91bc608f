"""A shape that cannot be built is refused with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megadlcm.config import InputError, ModelConfig, config_keys
from tests.support.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_token": 18}, "gives a head size of 4.5"),
        ({"d_token": 20}, "gives a head size of 5"),
        ({"d_concept": 25}, r"model\.d_concept = 25"),
        ({"token_kv_heads": 3}, "not a multiple of model.token_kv_heads = 3"),
        ({"concept_kv_heads": 4}, "not a multiple of model.concept_kv_heads = 4"),
        ({"concept_kv_heads": 0}, r"model\.concept_kv_heads = 0"),
        ({"target_tokens_per_concept": 1.0}, "must be > 1"),
        ({"target_tokens_per_concept": float("inf")}, "must be > 1"),
        ({"sharpening": 0.5}, "must be a number >= 1"),
        ({"max_segment_tokens": 1}, "must be >= 2, or 0"),
        ({"max_segment_tokens": -4}, "must be >= 2, or 0"),
        ({"rule_threshold": 1.5}, "between 0 and 1"),
        ({"backbone_layers": 10**9}, "<= 256"),
        ({"boundary_mode": "learned"}, "must be one of learned_global"),
        ({"attention_backend": "triton"}, "must be one of auto"),
        ({"backbone_layers": 0}, r"model\.backbone_layers = 0"),
        ({"boundary_size": 0}, r"model\.boundary_size = 0"),
        ({"norm_eps": 0.0}, "must be > 0"),
        ({"vocab_size": 0}, r"model\.vocab_size = 0"),
    ],
)
def test_a_wrong_shape_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny_config(**options)
    assert "\n" not in str(caught.value)
    assert caught.value.key in config_keys() and caught.value.key in str(caught.value)


def test_the_dense_model_needs_nothing_about_concepts() -> None:
    config = ModelConfig(
        architecture="dense",
        vocab_size=48,
        d_token=16,
        backbone_layers=4,
        token_heads=4,
        token_kv_heads=4,
        token_ffn_size=32,
    )
    assert (config.num_layers, config.token_head_size) == (4, 4)
    with pytest.raises(InputError, match="give the dense model a layer"):
        dataclasses.replace(config, backbone_layers=0)


def test_a_config_is_frozen_and_replace_checks_again() -> None:
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_token = 32  # type: ignore[misc]
    assert dataclasses.replace(config, d_token=32).token_head_size == 8
    with pytest.raises(InputError):
        dataclasses.replace(config, d_token=17)
