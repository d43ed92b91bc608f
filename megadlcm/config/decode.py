"""YAML and dotted overrides to RunConfig and back; every error is one line that names its key.

Scalars stay text until the type of their field is known; see `yaml_text.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from data_pipeline.config import LocalPathText
from data_pipeline.errors import InputError
from data_pipeline.masking import is_url, masked_values
from megadlcm.config.model import ModelConfig
from megadlcm.config.run import RunConfig
from megadlcm.config.yaml_text import CONTROL, parse_yaml, read_yaml, short

Section = TypeVar("Section")
_MAX_DIGITS = 18
_LOCAL = "a local path, not a URL"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run: defaults < file < overrides.

    Values are taken as they are, with two exceptions: data.seed null becomes the run's seed, and a
    length of the run given as an override replaces the file's, whichever of train_steps and
    train_tokens either uses.

    Args:
        path: YAML file.
        overrides: `dotted.key=value`, each value parsed as YAML.

    Returns:
        The resolved run.

    Raises:
        InputError: the file is missing or no YAML, or a key or value is not valid.
    """
    if is_url(path):  # a path has one slash less, and is said to be missing
        raise InputError(
            f"config {short(path)}: must be {_LOCAL}; name a YAML file such as "
            "configs/quickstart.yaml"
        )
    tree = read_yaml(Path(path))
    # all are parsed before one is applied: which lengths are given decides what is dropped
    values = [_parse_override(override) for override in overrides]
    _drop_replaced_length(tree, dict(values))
    for key, value in values:
        _apply_override(tree, key, value)
    return config_from_dict(tree)


def _drop_replaced_length(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Removes the file's length of the run where an override gives one; null gives none."""
    lengths = ("train_steps", "train_tokens")
    section = tree.get("training")
    given = any(values.get(f"training.{name}") is not None for name in lengths)
    if given and isinstance(section, dict):
        for name in lengths:
            section.pop(name, None)


def config_from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Decodes a run from nested mappings, as `config_to_dict` writes them.

    Args:
        tree: sections by key.

    Returns:
        The resolved run.

    Raises:
        InputError: a key or value is not valid.
    """
    config = _decode_section(RunConfig, tree, "")
    # resolved here, so that the saved config says what was drawn
    if config.data.seed is None:
        data = dataclasses.replace(config.data, seed=config.seed)
        config = dataclasses.replace(config, data=data)
    return config


def model_config_from_dict(tree: Mapping[str, Any]) -> ModelConfig:
    """Decodes the section `model` alone; raises InputError as `config_from_dict` does."""
    return _decode_section(ModelConfig, tree, "model")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Spells a config section, or the whole run, in plain mappings, lists, numbers and text."""
    return {
        _key(field): _plain(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def dump_config(config: RunConfig) -> str:
    """Spells a run as YAML that `load_config` reads back unchanged, but for passwords in URLs."""
    # in the order of the fields, as people read it
    return yaml.safe_dump(
        masked_values(config_to_dict(config)), sort_keys=False, allow_unicode=True
    )


def config_keys() -> list[str]:
    """All dotted keys of a run."""
    return list(_walk_keys(RunConfig, ""))


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(
            f"override '{short(override)}' must be key=value; for example training.train_steps=50",
            key=short(key),
        )
    return key, parse_yaml(text, f"override {short(key)}", key)


def _apply_override(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        if tree.get(section) is None:  # also a section that the file leaves empty
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            parent = short(".".join(sections[: depth + 1]))
            raise InputError(
                f"override {short(key)}: {parent} has no keys below it; override {parent} as a "
                "whole",
                key=parent,
            )
    tree[last] = value


def _decode_section(section: type[Section], tree: Any, prefix: str) -> Section:
    if not isinstance(tree, Mapping):
        raise _wrong(prefix, tree, "a section with keys", "write its keys below it, indented")
    fields = {_key(field): field for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    # with extras: a path is text that is marked as one
    hints = typing.get_type_hints(section, include_extras=True)
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise _unknown(_join(prefix, str(key)), list(fields), prefix)
        values[fields[key].name] = _decode(hints[fields[key].name], value, _join(prefix, key))
    for key, field in fields.items():
        if field.name not in values and _is_required(field):
            kind, missing = _describe(hints[field.name]), _join(prefix, key)
            raise InputError(f"{missing} is missing, must be {kind}; give it a value", key=missing)
    return section(**values)


def _decode(hint: Any, value: Any, key: str) -> Any:
    """Decodes a value by the type of its field."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        # only optional types are used: None and one other
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _decode(hint, value, key)
    if dataclasses.is_dataclass(hint):
        return _decode_section(typing.cast(type[Any], hint), value, key)
    if typing.get_origin(hint) is Annotated:
        path = _decode_path(value, key)
        if hint == LocalPathText and is_url(path):
            raise _wrong(key, path, _LOCAL, "name a file or folder that is mounted here")
        return path
    if typing.get_origin(hint) is tuple:
        return _decode_list(arguments, value, key)
    if typing.get_origin(hint) is Literal:
        if value not in arguments:
            nearest = difflib.get_close_matches(str(value), arguments, n=1)
            way_out = f"did you mean {nearest[0]}?" if nearest else "choose one of them"
            raise _wrong(key, value, _describe(hint), way_out)
        return value
    return _SCALARS[hint](value, key)


def _decode_list(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, "a list", "write it in brackets, as in [a, b]")
    if arguments[-1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong(key, value, f"a list of {len(arguments)}", "give as many values")
    return tuple(
        _decode(hint, item, f"{key}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _decode_bool(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false", "write one of the two")
    return value


def _decode_int(value: Any, key: str) -> int:
    number = _number(value)
    # without a bound 1e999999999 would be written out digit by digit
    if number is None or number.adjusted() > _MAX_DIGITS or number % 1:
        raise _wrong(key, value, "an integer", "write it with digits, as in 4096 or 1e12")
    return int(number)


def _decode_float(value: Any, key: str) -> float:
    number = _number(value)
    if number is None or not math.isfinite(float(number)):
        raise _wrong(key, value, "a number", "write it with digits, as in 0.1 or 3e-4")
    return float(number)


def _number(value: Any) -> Decimal | None:
    """The number that a value is or spells, exactly; None where it is none or not finite."""
    # a bool is an int to Python, and `seed: true` would be seed 1
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _decode_str(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(key, value, "text", "put it in quotes")
    if CONTROL.search(str(value)):
        raise _wrong(key, value, "text on one line", "remove its control characters")
    return str(value)


def _decode_path(value: Any, key: str) -> str:
    """Expands a leading ~ and environment variables, as a shell would; not what they expand to."""
    text = _decode_str(value, key)
    home = os.path.expanduser(text)
    if home == text and text.startswith("~"):
        raise _wrong(key, value, "a path whose ~ names a home folder", "write the whole path")
    # else it would be a folder of the root, or of wherever the command was started
    used = _variables(home) if home == text else ["HOME", *_variables(home)]
    if empty := [name for name in used if os.path.expandvars(f"${{{name}}}") == ""]:
        rule = "a path of variables that are not empty"
        raise _wrong(key, value, rule, f"export {empty[0]} with a value, or write the whole path")
    path = _decode_str(os.path.expandvars(home), key)
    left = _variables(path)
    # what is not set stays as it was
    if missing := [name for name in left if name in _variables(home)]:
        rule = "a path of variables that are set"
        raise _wrong(key, value, rule, f"export {missing[0]}, or write the whole path")
    # read again from the saved config it would be another path
    if left:
        raise _wrong(key, path, "a path without variables in it", "write the whole path")
    return path


def _variables(path: str) -> list[str]:
    return [plain or braced for plain, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", path)]


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    bool: _decode_bool,
    int: _decode_int,
    float: _decode_float,
    str: _decode_str,
}
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Annotated:
        return "a path"
    return _KINDS.get(hint, "a section with keys")


def _wrong(key: str, value: Any, rule: str, way_out: str) -> InputError:
    # as JSON: text in quotes shows blanks, and null, true and numbers look as in the file
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return InputError(f"{key or 'config'} = {short(shown)}, must be {rule}; {way_out}", key=key)


def _unknown(key: str, siblings: list[str], prefix: str) -> InputError:
    """Names the nearest key of the same section, or the same name in another section."""
    leaf, shown = key.rpartition(".")[2], short(key)
    nearest = [_join(prefix, name) for name in difflib.get_close_matches(leaf, siblings, n=1)]
    # the right name in the wrong section is the commonest mistake that spelling cannot find
    same_name = [name for name in config_keys() if name.rpartition(".")[2] == leaf]
    for candidates in (nearest, same_name):
        if candidates:
            way_out = f"did you mean {candidates[0]}?"
            return InputError(f"{shown} is not a config key; {way_out}", key=shown)
    way_out = f"{prefix or 'a run'} has {', '.join(siblings)}"
    return InputError(f"{shown} is not a config key; {way_out}", key=shown)


def _walk_keys(section: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key = _join(prefix, _key(field))
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk_keys(hint, key)
        else:
            yield key


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _key(field: dataclasses.Field[Any]) -> str:
    """Name in YAML: the field's, unless that is a word of Python."""
    return str(field.metadata.get("key", field.name))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
