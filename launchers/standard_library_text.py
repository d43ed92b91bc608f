"""Text that every Python installation carries: enough to show real training without a download."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"}
_MIN_PROSE_CHARACTERS = 200
_HELD_OUT_EVERY = 16


def write_corpus(folder: Path, max_code_bytes: int) -> dict[str, Path]:
    """Writes the standard library's sources (`code`) and prose (`en`) as JSON lines.

    Every sixteenth document is held out.

    Args:
        folder: where to write.
        max_code_bytes: sources are taken, in a fixed order, up to this many bytes.

    Returns:
        Path of each file by `<domain>_<split>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(_source_files(max_code_bytes))
    documents = {
        "code": [(str(path), text) for path, text in sources],
        "en": list(_prose(sources)),
    }
    paths = {}
    for domain, entries in documents.items():
        for split, held_out in (("train", False), ("valid", True)):
            path = folder / f"{domain}_{split}.jsonl"
            chosen = [
                {"id": name, "domain": domain, "source": "python", "text": text}
                for index, (name, text) in enumerate(entries)
                if (index % _HELD_OUT_EVERY == 0) == held_out
            ]
            lines = [json.dumps(entry, ensure_ascii=False) for entry in chosen]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            paths[f"{domain}_{split}"] = path
    return paths


def _source_files(max_bytes: int) -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    total = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative, text
            total += len(text)
        if total > max_bytes:
            return


def _prose(sources: list[tuple[Path, str]]) -> Iterator[tuple[str, str]]:
    """The language reference that `help()` shows, and each module's docstrings."""
    try:
        help_texts = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship them apart
        help_texts = {}
    for name, text in sorted(help_texts.items()):
        if len(text) >= _MIN_PROSE_CHARACTERS:
            yield f"topic/{name}", text
    for path, text in sources:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        prose = "\n\n".join(text for text in docstrings if text)
        if len(prose) >= _MIN_PROSE_CHARACTERS:
            yield f"docstrings/{path}", prose
