"""Imports go one way, and every heavy dependency enters by one door."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OURS = ("megadlcm", "data_pipeline", "launchers")
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))

# package -> what it may import of ours, itself apart; the longest name that fits a module decides
_CONFIG = ("megadlcm.config", "data_pipeline.errors")
_MODEL = ("megadlcm.model", "megadlcm.ops", *_CONFIG)
_PARALLEL = ("megadlcm.parallel", "megadlcm.plan", *_MODEL)
_ENGINE = ("megadlcm.engine", *_PARALLEL, "data_pipeline.reading")
_RUN_FOLDER = (
    "megadlcm.run_folder",
    *_CONFIG,
    "data_pipeline.output_folder",
    "data_pipeline.small_file",
    "data_pipeline.storage.locks",
)
_DATA = ("data_pipeline.errors", "data_pipeline.masking", "data_pipeline.small_file")
MAY_IMPORT = {
    "data_pipeline": (),
    "data_pipeline.storage": _DATA,
    "data_pipeline.config": (*_DATA, "data_pipeline.quotas", "data_pipeline.storage"),
    "data_pipeline.shard_format": (*_DATA, "data_pipeline.storage"),
    "data_pipeline.reading": (
        *_DATA,
        "data_pipeline.config",
        "data_pipeline.quotas",
        "data_pipeline.storage",
        "data_pipeline.shard_format",
        "data_pipeline.tokenizer",
    ),
    "data_pipeline.prepare": (
        *_DATA,
        "data_pipeline.options",
        "data_pipeline.output_folder",
        "data_pipeline.progress",
        "data_pipeline.storage",
        "data_pipeline.shard_format",
        "data_pipeline.tokenizer",
    ),
    "data_pipeline.prepare.formats": ("data_pipeline.errors", "data_pipeline.prepare.compression"),
    "data_pipeline.inspection": ("data_pipeline",),
    "data_pipeline.commands": ("data_pipeline",),
    "megadlcm": ("megadlcm.commands",),
    "megadlcm.config": (*_DATA, "data_pipeline.config"),
    "megadlcm.plan": _CONFIG,
    "megadlcm.run_folder": _RUN_FOLDER,
    "megadlcm.ops": ("megadlcm.config.constants", "megadlcm.config.kernels"),
    "megadlcm.model": _MODEL,
    "megadlcm.parallel": _PARALLEL,
    "megadlcm.engine": _ENGINE,
    "megadlcm.checkpoint": (
        *_ENGINE,
        *_RUN_FOLDER,
        "data_pipeline.masking",
        "data_pipeline.storage",
    ),
    "megadlcm.inference": (*_PARALLEL, "megadlcm.run_folder", "data_pipeline"),
    "megadlcm.training": (
        *_ENGINE,
        *_RUN_FOLDER,
        "megadlcm.inference",
        "megadlcm.checkpoint",
        "data_pipeline",
    ),
    "megadlcm.commands": ("megadlcm", "data_pipeline"),
    "launchers": ("megadlcm.config", "megadlcm.plan", "megadlcm.run_folder", "data_pipeline"),
}
# heavy dependency -> the files that may import it; webdataset is for readers of our shards
DOORS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("megadlcm/engine/engine.py",),
    "flash_attn": ("megadlcm/ops/backends/flash_attn.py",),
    "webdataset": (),
    "yaml": ("megadlcm/config/decode.py", "megadlcm/config/yaml_text.py"),
    "torch.utils.tensorboard": ("megadlcm/training/tensorboard.py",),
    "tensorboard": ("megadlcm/training/tensorboard.py",),
}
# the launcher's variables are read in one file; tokenizers takes its threads from another
ENVIRONMENT = ("megadlcm/parallel/environment.py", "data_pipeline/prepare/encode.py")
# runtime dependencies that no file imports: torch.utils.tensorboard does it, or a reader of shards
NOT_IMPORTED = {"tensorboard", "webdataset"}
NO_TORCH = (
    "data_pipeline",
    "launchers",
    "megadlcm.config",
    "megadlcm.plan",
    "megadlcm.run_folder",
    "megadlcm.commands",
)
NO_TORCH_DISTRIBUTED = ("megadlcm.ops", "megadlcm.model")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def forbidden_imports(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that its package may not have."""
    rule = max((name for name in MAY_IMPORT if is_below(module, name)), key=len)
    allowed = (rule, *MAY_IMPORT[rule])
    found = []
    for name in imports_of(tree):
        ours = any(is_below(name, package) for package in OURS)
        if ours and not any(is_below(name, package) for package in allowed):
            found.append(name)
        if is_below(name, "torch") and any(is_below(module, p) for p in NO_TORCH):
            found.append(name)
        distributed = is_below(name, "torch.distributed")
        if distributed and any(is_below(module, p) for p in NO_TORCH_DISTRIBUTED):
            found.append(name)
    return found


def doors_broken(path: str, tree: ast.AST) -> list[str]:
    """Heavy dependencies, and the environment, that a file may not reach for."""
    found = [
        name
        for name in imports_of(tree)
        for heavy, doors in DOORS.items()
        if is_below(name, heavy) and not path.startswith(doors)
    ]
    reads_environment = any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        for node in ast.walk(tree)
    )
    if reads_environment and path not in ENVIRONMENT:
        found.append("os.environ")
    return found


def test_imports_go_one_way() -> None:
    trees = {module_name(path): ast.parse(path.read_text("utf-8")) for path in SOURCES}
    assert len(trees) > 40
    found = {module: forbidden_imports(module, tree) for module, tree in trees.items()}
    assert {module: names for module, names in found.items() if names} == {}


def test_heavy_dependencies_enter_by_their_door() -> None:
    paths = {path.relative_to(ROOT).as_posix(): path for path in SOURCES}
    found = {name: doors_broken(name, ast.parse(p.read_text("utf-8"))) for name, p in paths.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_every_other_runtime_dependency_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dependencies = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    assert dependencies > NOT_IMPORTED
    trees = [ast.parse(path.read_text("utf-8")) for path in SOURCES]
    imported = {name.partition(".")[0] for tree in trees for name in imports_of(tree)}
    unused = {name for name in dependencies if name.replace("pyyaml", "yaml") not in imported}
    assert unused == NOT_IMPORTED


@pytest.mark.parametrize(
    ("module", "line", "name"),
    [
        ("megadlcm.ops.boundary", "from megadlcm.config import RunConfig", "megadlcm.config"),
        ("megadlcm.model.dlcm", "import megadlcm.engine.step", "megadlcm.engine"),
        ("megadlcm.model.dlcm", "import torch.distributed", "torch.distributed"),
        ("data_pipeline.reading.order", "from megadlcm import config", "megadlcm.config"),
        ("megadlcm.config.run", "def f():\n    import torch", "torch"),
        ("megadlcm.config.run", "from data_pipeline import reading", "data_pipeline.reading"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str, name: str) -> None:
    found = forbidden_imports(module, ast.parse(line))
    assert len(found) == 1
    assert found[0].startswith(name)


@pytest.mark.parametrize(
    "line",
    [
        "import yaml",
        "from deepspeed import comm",
        "import webdataset",
        "import os\nos.environ['A']",
    ],
)
def test_a_second_door_is_found(line: str) -> None:
    assert doors_broken("megadlcm/engine/step.py", ast.parse(line))


def test_tests_have_no_package_files() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
