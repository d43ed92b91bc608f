"""A path in a config means what it means in a shell, in every key that is one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, LocalPathText, PathText, SourceConfig
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


LOCAL = [override for override in PATHS if "path" not in override and "folder" not in override]


def marked_fields(section: Any, mark: Any) -> Iterator[str]:
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if mark in (hint, *typing.get_args(hint)):
            yield name


def test_every_key_that_is_a_path_is_marked_as_one() -> None:
    assert list(marked_fields(RunConfig, LocalPathText)) == ["output_dir"]
    assert list(marked_fields(DataConfig, LocalPathText)) == ["cache_dir", "tokenizer"]
    assert list(marked_fields(SourceConfig, PathText)) == ["path"]
    assert list(marked_fields(CheckpointConfig, PathText)) == ["folder"]
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
        ("s3:/bucket$SCRATCH", "s3:/bucket/fast/ada"),
        # nothing to expand
        ("runs/a~b", "runs/a~b"),
        ("shards/~ada:/en", "shards/~ada:/en"),
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
        ("$EMPTY/run", "variables that are not empty; export EMPTY with a value, or write"),
        ("runs/${EMPTY}", "export EMPTY with a value"),
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
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(InputError, match=problem) as caught:
        load_config(run_file, [override.format(text)])
    key = override.partition("=")[0]
    assert str(caught.value).startswith(key) and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", PATHS)
def test_an_empty_home_is_no_folder(
    run_file: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(InputError, match="export HOME with a value"):
        load_config(run_file, [override.format("~/run")])


@pytest.mark.parametrize("url", ["s3://bucket/run", "http://ada:secret@host/a", "file:///a/run"])
def test_a_url_is_refused_where_only_a_local_path_can_be(
    run_file: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "s3://bucket")
    assert len(LOCAL) == 3
    for override in LOCAL:
        for text in (url, url.replace("s3://bucket", "$BUCKET")):
            with pytest.raises(InputError) as caught:
                load_config(run_file, [override.format(text)])
            line, key = str(caught.value), override.partition("=")[0]
            assert line.startswith(f'{key} = "{url.partition(":")[0]}://')
            assert line.endswith(
                "local path, not a URL; name a file or folder that is mounted here"
            )
            assert "secret" not in line and caught.value.key == key
    for override in PATHS.keys() - set(LOCAL):
        assert PATHS[override](load_config(run_file, [override.format(url)])) == url
    with pytest.raises(InputError, match=r"config .*: must be a local path, not a URL") as caught:
        load_config(url)
    assert "secret" not in str(caught.value)


def test_of_a_long_value_no_part_of_a_password_is_shown(run_file: Path) -> None:
    """Its end, by which it is known as one, lies in the middle, which is left out."""
    with pytest.raises(InputError, match=r"output_dir = .*\*\*\*@host/aaa") as caught:
        load_config(run_file, [f"output_dir=http://ada:{'secret' * 40}@host/{'a' * 300}"])
    assert "secret" not in str(caught.value) and " ... " in str(caught.value)
