"""Files and functions stay short, code is ASCII, and words that promise work carry a number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("megadlcm", "data_pipeline", "launchers", "tests", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "configs").glob("*.yaml")),
    *(ROOT / name for name in ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt")),
]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# assembled here, so that this file does not contain what it forbids
PROMISE = re.compile("(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")(?!\(#\d+\))")
UNFINISHED = "NotImplemented" + "Error"
MACHINE_PATH = re.compile(r"(?<![\w.~}$])/(?:work|home|root|opt|mnt|scratch)/")
EMPTY_MODULES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(text: str) -> list[str]:
    """Functions of more than MAX_FUNCTION_LINES lines."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions)
        and (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES
    ]


def lacks_a_beginning(text: str) -> bool:
    """Whether a module does not say what it is, or evaluates its annotations."""
    tree = ast.parse(text)
    only_docstring = len(tree.body) == 1
    postpones = "from __future__ import annotations" in text
    return not ast.get_docstring(tree) or not (postpones or only_docstring)


def test_files_and_functions_are_short() -> None:
    assert len(SOURCES) > 50
    texts = {relative(path): path.read_text(encoding="utf-8") for path in SOURCES}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}
    functions = {name: long_functions(text) for name, text in texts.items()}
    assert {name: found for name, found in functions.items() if found} == {}


def test_code_is_ascii() -> None:
    lines = [
        (relative(path), line) for path in TEXTS for line in path.read_text("utf-8").splitlines()
    ]
    assert [(name, line) for name, line in lines if not line.isascii()] == []


def test_nothing_is_promised_without_a_number_and_nothing_is_a_stub() -> None:
    texts = {relative(path): path.read_text(encoding="utf-8") for path in TEXTS}
    assert {name for name, text in texts.items() if PROMISE.search(text)} == set()
    assert {name for name, text in texts.items() if UNFINISHED in text} == set()


def test_no_file_names_a_path_of_some_machine() -> None:
    pages = [path for path in ROOT.glob("**/*.md") if ".venv" not in path.parts]
    texts = {relative(path): path.read_text(encoding="utf-8") for path in [*TEXTS, *pages]}
    assert {name for name, text in texts.items() if MACHINE_PATH.search(text)} == set()


def test_a_module_is_named_after_what_it_is_about() -> None:
    assert [relative(path) for path in SOURCES if path.name in EMPTY_MODULES] == []


def test_a_module_says_what_it_is_and_postpones_annotations() -> None:
    modules = [path for path in SOURCES if not relative(path).startswith("tests/")]
    texts = {relative(path): path.read_text(encoding="utf-8") for path in modules}
    assert {name for name, text in texts.items() if lacks_a_beginning(text)} == set()


def test_what_is_forbidden_is_found() -> None:
    assert MACHINE_PATH.search("see " + "/ho" + "me/me/x")
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(f"def long():\n{body}") == ["long"]
    assert PROMISE.search("# " + "TO" + "DO later")
    assert not PROMISE.search("# " + "TO" + "DO(#12) later")
    assert lacks_a_beginning("import os\n")
    assert lacks_a_beginning('"""About."""\nimport os\n')
    assert not lacks_a_beginning('"""About."""\n')
