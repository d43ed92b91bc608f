"""Text that every Python installation carries: enough to show real training without a download."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

# pydoc_data holds the help texts, which are prose
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "__pycache__",
}
_MIN_PROSE_CHARACTERS = 200
_HELD_OUT_EVERY = 16


def write_corpus(folder: Path, max_code_bytes: int) -> dict[str, Path]:
    """Writes the standard library's sources (`code`) and prose (`en`) as JSON lines.

    Every sixteenth module and help text is held out. The docstrings of a module, which its source
    contains, go where the source goes: else a part of the held-out text would be trained.

    Args:
        folder: where to write.
        max_code_bytes: sources are taken, in a fixed order, up to this many bytes.

    Returns:
        Path of each file by `<domain>_<split>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(_source_files(max_code_bytes))
    help_texts = list(_help_texts())
    held_out = {name for name, _ in [*sources[::_HELD_OUT_EVERY], *help_texts[::_HELD_OUT_EVERY]]}
    # (name, what it stands and falls with, text)
    documents = {
        "code": [(name, name, text) for name, text in sources],
        "en": [
            *((f"topic/{name}", name, text) for name, text in help_texts),
            *((f"docstrings/{name}", name, text) for name, text in _docstrings(sources)),
        ],
    }
    paths = {}
    for domain, entries in documents.items():
        for split in ("train", "valid"):
            path = folder / f"{domain}_{split}.jsonl"
            chosen = [
                {"id": name, "domain": domain, "source": "python", "text": text}
                for name, origin, text in entries
                if (origin in held_out) == (split == "valid")
            ]
            lines = [json.dumps(entry, ensure_ascii=False) for entry in chosen]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            paths[f"{domain}_{split}"] = path
    return paths


def _source_files(max_bytes: int) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    total = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # OSError: a link that leads nowhere
            continue
        if text.strip():
            yield relative.as_posix(), text
            total += len(text.encode("utf-8"))
        if total > max_bytes:
            return


def _help_texts() -> Iterator[tuple[str, str]]:
    """The language reference that `help()` shows, by topic."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship them apart
        return
    for name, text in sorted(topics.items()):
        if len(text) >= _MIN_PROSE_CHARACTERS:
            yield name, text


def _docstrings(sources: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each module's docstrings, joined."""
    for name, text in sources:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        prose = "\n\n".join(text for text in docstrings if text)
        if len(prose) >= _MIN_PROSE_CHARACTERS:
            yield name, prose
