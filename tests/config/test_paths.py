"""A path in a config means what it means in a shell, in every key that is one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, PathText, SourceConfig
from data_pipeline.errors import InputError
from megadlcm.config import (
    CheckpointConfig,
    RunConfig,
    config_from_dict,
    config_to_dict,
    load_config,
)

PATHS: dict[str, Callable[[RunConfig], str | None]] = {
    "output_dir={}": lambda config: config.output_dir,
    "data.train=[{{path: '{}'}}]": lambda config: config.data.train[0].path,
    "data.valid=[{{path: '{}'}}]": lambda config: config.data.valid[0].path,
    "data.cache_dir={}": lambda config: config.data.cache_dir,
    "data.tokenizer={}": lambda config: config.data.tokenizer,
    "checkpoint.folder={}": lambda config: config.checkpoint.folder,
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h/ada")
    monkeypatch.setenv("SCRATCH", "/fast/ada")
    monkeypatch.delenv("NOWHERE", raising=False)


def marked_fields(section: Any) -> Iterator[str]:
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if PathText in (hint, *typing.get_args(hint)):
            yield name


def test_every_key_that_is_a_path_is_marked_as_one() -> None:
    assert list(marked_fields(RunConfig)) == ["output_dir"]
    assert list(marked_fields(DataConfig)) == ["cache_dir", "tokenizer"]
    assert list(marked_fields(SourceConfig)) == ["path"]
    assert list(marked_fields(CheckpointConfig)) == ["folder"]
    texts = {
        field.name
        for section in (RunConfig, DataConfig, SourceConfig, CheckpointConfig)
        for field in dataclasses.fields(section)
        if "str" in str(field.type) and "Path" not in str(field.type)
    }
    assert texts == {"name", "on_damage"}


@pytest.mark.parametrize("override", PATHS)
@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("~/run", "/h/ada/run"),
        ("~", "/h/ada"),
        ("~root/run", str(Path("~root").expanduser() / "run")),
        ("$HOME/run", "/h/ada/run"),
        ("${SCRATCH}/a/$SCRATCH", "/fast/ada/a//fast/ada"),
        ("s3://bucket$SCRATCH", "s3://bucket/fast/ada"),
        # nothing to expand
        ("runs/a~b", "runs/a~b"),
        ("http://host/~ada/shards", "http://host/~ada/shards"),
        ("cost 5$", "cost 5$"),
    ],
)
def test_a_path_is_expanded_as_a_shell_would(
    run_file: Path, override: str, text: str, meant: str
) -> None:
    quoted = f'"{text}"' if override.endswith("={}") else text
    config = load_config(run_file, [override.format(quoted)])
    assert PATHS[override](config) == meant
    # the saved config says what was meant, and is read as it stands
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize("override", PATHS)
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("~nobody-by-this-name/run", "names a home folder"),
        ("$NOWHERE/run", "export NOWHERE"),
        ("a/${NOWHERE}", "export NOWHERE"),
        ("$ODD/run", "without variables"),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_one_line(
    run_file: Path,
    override: str,
    text: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ODD", "/a/$SCRATCH")
    with pytest.raises(InputError, match=problem) as caught:
        load_config(run_file, [override.format(text)])
    key = override.partition("=")[0]
    assert str(caught.value).startswith(key) and "\n" not in str(caught.value)
