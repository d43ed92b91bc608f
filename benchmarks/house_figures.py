"""The house in figures: files, functions, comments, rooms, arrows and circles of a checkout.

    python -m benchmarks.house_figures [CHECKOUT ...] [--json]

Reads the sources as text and runs none of them. An arrow is an import of a file from another one,
those inside of functions included. At each folder its files and subfolders are the rooms; a circle
is a set of rooms that import each other, over however many files.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("megadlcm", "data_pipeline", "launchers")
_LONG = 25
"""Code lines from which a function should say why at its sharp places."""

Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Figures:
    """What one script says of a checkout."""

    files: int
    lines: int
    file_median: float
    file_p90: float
    file_largest: int
    function_median: float
    function_p90: float
    function_longest: int
    comment_share: float
    long_functions: int
    long_functions_without_comment: int
    annotated_share: float
    circles: list[list[str]]
    rooms: dict[str, tuple[int, int, int]]
    """By folder: files, arrows that leave it, other folders and files that those lead to."""


def source_files(root: Path) -> list[Path]:
    """The sources of the packages below a checkout."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def imported_files(path: Path, root: Path) -> Iterator[str]:
    """Files of the packages that a file imports, as paths from the root; lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = _file_of(name, root)
            if found is not None and found != path:
                yield found.relative_to(root).as_posix()


def _file_of(name: str, root: Path) -> Path | None:
    """The file in which a dotted name is defined: a module, or something in one."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for size in (len(parts), len(parts) - 1):
        place = root.joinpath(*parts[:size])
        if place.with_suffix(".py").is_file():
            return place.with_suffix(".py")
        if size < len(parts) and (place / "__init__.py").is_file():
            return place / "__init__.py"
        if size == len(parts) and (place / "__init__.py").is_file():
            return place / "__init__.py"
    return None


def import_graph(root: Path) -> Graph:
    """The files that each file imports."""
    return {
        path.relative_to(root).as_posix(): set(imported_files(path, root))
        for path in source_files(root)
    }


def circles(graph: Graph) -> list[list[str]]:
    """Circles between the rooms of every folder, the checkout's own included.

    Args:
        graph: files by file.

    Returns:
        Sets of rooms that import each other, each sorted; empty where imports go one way.
    """
    found = []
    folders = {parent.as_posix() for path in graph for parent in Path(path).parents}
    for folder in sorted(folders):
        rooms: Graph = defaultdict(set)
        for source, targets in graph.items():
            for target in targets:
                ends = _room(source, folder), _room(target, folder)
                if None not in ends and ends[0] != ends[1]:
                    rooms[str(ends[0])].add(str(ends[1]))
        found += [sorted(members) for members in _components(rooms) if len(members) > 1]
    return found


def _room(path: str, folder: str) -> str | None:
    """The file or subfolder of a folder in which a path lies; None outside of the folder."""
    if folder != "." and not path.startswith(f"{folder}/"):
        return None
    rest = path if folder == "." else path[len(folder) + 1 :]
    first = rest.split("/")[0]
    return first if folder == "." else f"{folder}/{first}"


def _components(graph: Graph) -> list[set[str]]:
    """Strongly connected components, by who reaches whom: graphs of rooms are small."""
    reach = {node: _reached(graph, node) for node in graph}
    found: list[set[str]] = []
    for node, own in reach.items():
        if not any(node in members for members in found):
            found.append({node} | {other for other in own if node in reach.get(other, ())})
    return found


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def rooms_and_arrows(graph: Graph) -> dict[str, tuple[int, int, int]]:
    """By folder: files, arrows from them to files elsewhere, and how many rooms those lie in."""
    result = {}
    for folder in sorted({Path(path).parent.as_posix() for path in graph}):
        files = [path for path in graph if Path(path).parent.as_posix() == folder]
        leaving = {
            (source, target)
            for source in files
            for target in graph[source]
            if Path(target).parent.as_posix() != folder
        }
        reached = {Path(target).parent.as_posix() for _, target in leaving}
        result[folder] = (len(files), len(leaving), len(reached))
    return result


def measure(root: Path) -> Figures:
    """Measures a checkout."""
    texts = [path.read_text(encoding="utf-8") for path in source_files(root)]
    lengths = [len(text.splitlines()) for text in texts]
    commented = [_comment_lines(text) for text in texts]
    functions = [
        (node.end_lineno - node.lineno + 1, _code_lines(node), _has_comment(node, lines), node)
        for text, lines in zip(texts, commented, strict=True)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    sizes = [code for _, code, _, _ in functions]
    long = [with_comment for _, code, with_comment, _ in functions if code >= _LONG]
    graph = import_graph(root)
    return Figures(
        files=len(texts),
        lines=sum(lengths),
        file_median=statistics.median(lengths),
        file_p90=statistics.quantiles(lengths, n=10)[-1],
        file_largest=max(lengths),
        function_median=statistics.median(sizes),
        function_p90=statistics.quantiles(sizes, n=10)[-1],
        function_longest=max(whole for whole, *_ in functions),
        comment_share=sum(map(len, commented)) / sum(lengths),
        long_functions=len(long),
        long_functions_without_comment=long.count(False),
        annotated_share=statistics.mean(_is_annotated(node) for *_, node in functions),
        circles=circles(graph),
        rooms=rooms_and_arrows(graph),
    )


def _comment_lines(text: str) -> set[int]:
    """Numbers of the lines with a comment that says something to a reader."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT
        and not token.string.startswith(("# noqa", "# type:", "# fmt:", "#!"))
    }


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert node.end_lineno is not None
    whole = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
        return whole - ((first.end_lineno or first.lineno) - first.lineno + 1)
    return whole


def _has_comment(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: set[int]) -> bool:
    return any(node.lineno <= line <= (node.end_lineno or node.lineno) for line in lines)


def _is_annotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
    return node.returns is not None and all(argument.annotation for argument in own)


def table(checkouts: Sequence[tuple[str, Figures]]) -> str:
    """Spells figures side by side, in Markdown."""
    head = ["", *(name for name, _ in checkouts)]
    rows = [
        ("files, lines", lambda f: f"{f.files}, {f.lines:,}"),
        (
            "file: median / p90 / largest",
            lambda f: _three(f.file_median, f.file_p90, f.file_largest),
        ),
        (
            "function: median / p90 / longest",
            lambda f: _three(f.function_median, f.function_p90, f.function_longest),
        ),
        ("lines with a comment", lambda f: f"{f.comment_share:.1%}"),
        (
            f"functions of {_LONG}+ code lines without one",
            lambda f: f"{f.long_functions_without_comment} of {f.long_functions}",
        ),
        ("functions annotated", lambda f: f"{f.annotated_share:.0%}"),
        ("circles", lambda f: "; ".join(" <-> ".join(names) for names in f.circles) or "none"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        "| " + " | ".join([name, *(show(f) for _, f in checkouts)]) + " |" for name, show in rows
    ]
    for name, figures in checkouts:
        lines += [
            "",
            f"{name}:",
            "",
            "| room | files | arrows out | to rooms |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {room} | {files} | {arrows} | {rooms} |"
            for room, (files, arrows, rooms) in figures.rooms.items()
        ]
    return "\n".join(lines)


def _three(median: float, p90: float, largest: int) -> str:
    return f"{median:.0f} / {p90:.0f} / {largest}"


def main() -> None:
    """Measures the checkouts that are named, or this one."""
    parser = argparse.ArgumentParser(description="The house in figures.")
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()], metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    measured = [(path.resolve().name, measure(path.resolve())) for path in arguments.checkouts]
    if arguments.json:
        print(json.dumps({name: asdict(figures) for name, figures in measured}, indent=2))
    else:
        print(table(measured))


if __name__ == "__main__":
    main()
