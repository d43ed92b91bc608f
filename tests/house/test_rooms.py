"""The rooms are those of the front page, imports go down its picture, and tests mirror them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from benchmarks.house_figures import Graph, circles, import_graph
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# what may be tested apart from a room of its own
OTHER_TESTS = {"support", "house", "golden", "end_to_end", "benchmarks"}


def rooms_of_picture(page: str) -> list[str]:
    """Folders in the picture of the rooms, from top to bottom."""
    _, _, rest = page.partition("## The rooms")
    picture = rest.split("```")[1]
    rooms, parent = [], ""
    for line in picture.splitlines():
        names = re.match(r"( *)((?:[a-z_]+/ *)+)", line)
        if names is None:
            continue
        below = parent if len(names[1]) > 1 else ""
        found = [below + name.rstrip("/") for name in names[2].split()]
        rooms += found
        if not below:
            parent = f"{found[0]}/"
    return rooms


def folders_with_code() -> Iterator[str]:
    for package in ("megadlcm", "data_pipeline"):
        for path in (ROOT / package).iterdir():
            if path.is_dir() and list(path.glob("*.py")):
                yield f"{package}/{path.name}"


def upward(graph: Graph, rooms: list[str]) -> set[tuple[str, str]]:
    """Arrows from a room to one that stands above it."""
    found = set()
    for source, targets in graph.items():
        for target in targets:
            ends = [
                max((r for r in rooms if f.startswith(f"{r}/")), key=len) for f in (source, target)
            ]
            if rooms.index(ends[1]) < rooms.index(ends[0]) and "/" in ends[0] and "/" in ends[1]:
                found.add((ends[0], ends[1]))
    return found


def test_every_folder_of_the_picture_exists_and_none_is_missing() -> None:
    rooms = rooms_of_picture(README)
    assert len(rooms) > 15
    assert [room for room in rooms if not (ROOT / room).is_dir()] == []
    assert set(folders_with_code()) <= set(rooms)


def test_every_path_of_the_front_page_exists() -> None:
    """Those in its pictures and tables, which no link leads to."""
    named = set(
        re.findall(r"(?<![\w/.])((?:megadlcm|data_pipeline|launchers|tests)/[\w/.]*)", README)
    )
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_imports_go_down_the_picture() -> None:
    graph = import_graph(ROOT)
    assert sum(map(len, graph.values())) > 300
    assert upward(graph, rooms_of_picture(README)) == set()


def test_no_imports_form_a_circle() -> None:
    assert circles(import_graph(ROOT)) == []


@pytest.mark.parametrize(
    ("arrow", "circle"),
    [
        (("data_pipeline/errors.py", "data_pipeline/tokenizer.py"), "data_pipeline/errors.py"),
        (("megadlcm/plan/stages.py", "megadlcm/parallel/mesh.py"), "megadlcm/plan"),
        (
            ("megadlcm/parallel/watch/heartbeat.py", "megadlcm/parallel/mesh.py"),
            "megadlcm/parallel/watch",
        ),
        (("data_pipeline/config.py", "megadlcm/config/run.py"), "megadlcm"),
        (("megadlcm/config/run.py", "launchers/quickstart/report.py"), "launchers"),
    ],
)
def test_a_circle_is_found(arrow: tuple[str, str], circle: str) -> None:
    """Negative control, between files, rooms and top-level folders."""
    graph = import_graph(ROOT)
    source, target = arrow
    assert target in graph
    graph[source] = graph[source] | {target}
    assert any(circle in members for members in circles(graph))


def test_an_upward_import_is_found() -> None:
    graph = {"megadlcm/ops/random.py": {"megadlcm/model/dlcm.py"}, "megadlcm/model/dlcm.py": set()}
    rooms = ["megadlcm/model", "megadlcm/ops"]
    assert upward(graph, rooms) == {("megadlcm/ops", "megadlcm/model")}


def test_tests_mirror_the_rooms() -> None:
    folders = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("*")
        if path.is_dir() and any(path.glob("test_*.py"))
    }
    strange = {
        name
        for name in folders
        if name.split("/")[0] not in OTHER_TESTS
        and not (ROOT / "megadlcm" / name).is_dir()
        and not (ROOT / name).is_dir()
    }
    assert folders and strange == set()


def test_helpers_of_tests_stand_in_one_room() -> None:
    loose = [path.name for path in (ROOT / "tests").glob("*.py") if path.name != "conftest.py"]
    assert loose == []
    borrowed = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"^from tests\.[\w.]*test_\w+ import", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert borrowed == []
