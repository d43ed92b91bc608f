"""The data section refuses what cannot be meant."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from tests.support.tiny_shards import one_line


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    """Zero included: a source that is never read is a mistake."""
    with pytest.raises(InputError, match="weight") as error:
        SourceConfig("folder", weight)
    one_line(error)


@pytest.mark.parametrize(
    "key",
    [
        "seq_len",
        "shuffle_block",
        "prefetch_steps",
        "reader_threads",
        "read_attempts",
        "cache_bytes",
    ],
)
def test_counts_must_be_positive(key: str) -> None:
    """Each message names its key."""
    with pytest.raises(InputError, match=rf"data\.{key} = 0, must be >= 1"):
        changes: dict[str, Any] = {key: 0}
        replace(DataConfig(), **changes)


def test_names_of_sources_differ_and_default_to_the_path() -> None:
    """Metrics are told apart by them."""
    assert SourceConfig("a/b").label == "a/b"
    assert SourceConfig("a/b", name="web").label == "web"
    with pytest.raises(InputError, match=r"data\.valid: two sources are called 'web'"):
        DataConfig(valid=(SourceConfig("a", name="web"), SourceConfig("b", name="web")))
    with pytest.raises(InputError, match="seed"):
        DataConfig(seed=-1)
    with pytest.raises(InputError, match=r"data\.on_damage = 'ignore', must be one of stop, skip"):
        DataConfig(on_damage="ignore")
    with pytest.raises(InputError, match="max_skipped_tokens = -1"):
        DataConfig(max_skipped_tokens=-1)
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="timeout_seconds"):
            DataConfig(timeout_seconds=seconds)
    with pytest.raises(InputError, match="path is empty"):
        SourceConfig("")


def test_the_configuration_needs_only_the_standard_library() -> None:
    """A login node checks a run without numpy or torch."""
    code = (
        "import sys, data_pipeline.config, data_pipeline.errors, data_pipeline.commands.data; "
        "loaded = {'numpy', 'torch', 'tokenizers', 'rich'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
