"""YAML as text and nothing else, bounded; every error is one line.

PyYAML alone would read `3e-4` as text, `on` as true and `1:30` as ninety: scalars stay text until
the type of their field is known. For the same reason tags, anchors and aliases are refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import InputError
from data_pipeline.masking import masked
from data_pipeline.small_file import open_ordinary

_MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 20
# far more than two thousand sources need, and read in about a second
_MAX_NODES = 20_000
_MAX_SHOWN = 200
# what would break a line, or cannot be in a file name or in UTF-8
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


class _Loader(yaml.SafeLoader):
    """Reads null, true and false, and everything else as text; refuses a key given twice."""

    # not a ClassVar: PyYAML declares it as a plain attribute
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    _depth = 0
    _num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Reads a node; refuses what could give it another type, or itself as a part."""
        event = self.peek_event()
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            problem = "tags, anchors and aliases are not supported"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if self._depth == _MAX_DEPTH:
            problem = f"more than {_MAX_DEPTH} levels of nesting"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES:,} keys and values"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping after comparing its keys, which PyYAML does not."""
        seen: set[Any] = set()
        for key, _ in node.value:
            # a key may be a list, which nothing is looked up by
            name = key.value if isinstance(key, yaml.ScalarNode) else repr(key.value)
            if name in seen:
                problem = f"the key {short(repr(name))} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), None
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a file of `key: value` lines; raises InputError where it is none."""
    try:
        # a pipe would be waited for, a device read without an end
        with os.fdopen(open_ordinary(path), "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, InputError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no ordinary file"
        raise _no_config(path, reason) from error
    if len(content) > _MAX_BYTES:
        raise InputError(
            f"config {short(path)}: longer than {_MAX_BYTES / 2**20:g} MiB, which no config "
            "is; name a YAML file such as configs/quickstart.yaml"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_config(path, "not UTF-8 text") from error
    tree = parse_yaml(text, f"config {short(path)}")
    if not isinstance(tree, dict):
        raise InputError(
            f"config {short(path)}: must hold `key: value` lines; see configs/quickstart.yaml"
        )
    return tree


def _no_config(path: Path, reason: str | None) -> InputError:
    return InputError(
        f"config {short(path)}: {reason}; name a YAML file such as configs/quickstart.yaml"
    )


def parse_yaml(text: str, origin: str, key: str = "") -> Any:
    """Parses YAML; raises InputError that begins with `origin` and carries `key`."""
    try:
        return yaml.load(text, Loader=_Loader)
    # an escape such as \UFFFFFFFF is a number that PyYAML does not check
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(
            f"{origin}: YAML that cannot be read{where}: {short(reason)}; correct it",
            key=short(key),
        ) from error


def short(value: Any) -> str:
    """Shows what a user wrote on one line, without the middle where it is long."""
    text = masked(str(value))  # of a cut one it could not be told where a password ends
    if len(text) > _MAX_SHOWN:
        text = f"{text[: _MAX_SHOWN // 2]} ... {text[-_MAX_SHOWN // 4 :]}"
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
