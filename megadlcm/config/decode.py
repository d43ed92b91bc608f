"""YAML and dotted overrides to RunConfig and back; every error names its key.

PyYAML alone is not enough: it reads 3e-4 as a string and `on` as true, so each value is decoded
by the type of the field that it is for.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data_pipeline.errors import InputError
from megadlcm.config.model import ModelConfig
from megadlcm.config.run import RunConfig

Section = TypeVar("Section")
_MAX_DIGITS = 18


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file; overrides win over the file, the file over the defaults.

    Args:
        path: YAML file.
        overrides: `dotted.key=value`, the value in YAML.

    Returns:
        The checked run; `data.seed` null takes the run's seed, nothing else is filled in.

    Raises:
        InputError: file, key or value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read ({error}); check the path") from error
    values = _parse_yaml(text, f"config {path}")
    if not isinstance(values, dict):
        raise InputError(f"config {path}: must be a mapping of keys; see configs/quickstart.yaml")
    for override in overrides:
        _apply_override(values, override)
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a run from nested mappings, strictly.

    Args:
        values: what a config file holds.

    Returns:
        The checked run.

    Raises:
        InputError: a key or value is wrong.
    """
    config = _decode_section(RunConfig, values, "")
    if config.data.seed is None:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, seed=config.seed)
        )
    return config


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Builds the model section alone, strictly; raises InputError."""
    return _decode_section(ModelConfig, values, "model")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Turns a run into plain values that `config_from_dict` reads back to an equal run."""
    encoded = _encode(config)
    assert isinstance(encoded, dict)
    return encoded


def dump_config(config: RunConfig) -> str:
    """Writes a run as YAML."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _encode(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return {_key(f): _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_encode(entry) for entry in value]
    return value


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split())
        raise InputError(f"{where}: not valid YAML ({message}); correct the syntax") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: must read key=value; write section.key=value")
    *parents, last = key.split(".")
    section = values
    for depth, name in enumerate(parents):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            where = ".".join(parents[: depth + 1])
            raise InputError(f"override {override!r}: {where} has no keys; override {where} whole")
    section[last] = _parse_yaml(text, f"override {override!r}")


def _decode_section(cls: type[Section], values: object, where: str) -> Section:
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise InputError(
            f"{where} = {values!r}: must be a mapping of keys; indent its keys below it"
        )
    fields = {_key(entry): entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise InputError(_unknown_key(f"{prefix}{key}", str(key), prefix, list(fields)))
    hints = typing.get_type_hints(cls)
    decoded = {}
    for key, entry in fields.items():
        if key in values:
            decoded[entry.name] = _decode(hints[entry.name], values[key], f"{prefix}{key}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise InputError(f"{prefix}{key}: is missing and has no default; add it")
    return cls(**decoded)


def _key(entry: dataclasses.Field[Any]) -> str:
    return str(entry.metadata.get("key", entry.name))


def _unknown_key(dotted: str, key: str, prefix: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    way_out = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(names)}"
    return f"{dotted}: unknown key; {way_out}"


def _decode(hint: Any, value: object, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _decode(inner[0], value, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _decode_section(hint, value, key)
    if origin is tuple:
        return _decode_tuple(arguments, value, key)
    return _decode_scalar(hint, value, key)


def _decode_tuple(arguments: tuple[Any, ...], value: object, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{key} = {value!r}: must be a list; write [..., ...]")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise InputError(f"{key} = {value!r}: must have {len(arguments)} entries; change the list")
    return tuple(
        _decode(hint, entry, f"{key}[{index}]")
        for index, (hint, entry) in enumerate(zip(arguments, value, strict=True))
    )


def _decode_scalar(hint: type, value: object, key: str) -> Any:
    """Accepts a value of the field's type, and numbers in the spellings that YAML misreads."""
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if hint is float and number is not None:
            return float(number)
        if hint is int and number is not None and float(number).is_integer():
            return int(number)
    words = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    found = f"got {type(value).__name__}" if value is not None else "got null"
    raise InputError(f"{key} = {value!r}: must be {words[hint]}, {found}; correct the value")


def _number(value: object) -> int | float | None:
    if isinstance(value, int | float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, str):
        try:
            return _number(float(value))
        except ValueError:
            return None
    return None
