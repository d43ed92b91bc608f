"""The constraints file pins the whole installed environment, in lines that any index knows."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

from tests.support.paths import ROOT

PIN = re.compile(r"([a-zA-Z0-9][\w.-]*)==(\d+(?:\.\d+)*)")
# a range by design; what belongs to an installer; what only a torch with CUDA brings
RANGE = "deepspeed>=0.19.8,<0.20"
INSTALLERS = {"pip", "setuptools", "wheel"}
CUDA = re.compile(r"nvidia-|cuda-|triton")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sections() -> list[dict[str, str]]:
    """Version by package name of the two parts of the file; a range has its own text."""
    text = (ROOT / "constraints.txt").read_text("utf-8")
    parts = text.split("# What they bring.")
    assert len(parts) == 2
    found = []
    for part in parts:
        lines = [line for line in part.splitlines()[1:] if line and not line.startswith("#")]
        pins = [PIN.fullmatch(line) for line in lines if line != RANGE]
        assert all(pins), [line for line in lines if line != RANGE and not PIN.fullmatch(line)]
        versions = {normal(pin[1]): pin[2] for pin in pins if pin}
        if RANGE in lines:
            versions["deepspeed"] = RANGE
        assert len(versions) == len(lines)
        found.append(versions)
    return found


def required_names(lines: list[str]) -> set[str]:
    """Packages that requirements name on this platform, without optional ones."""
    wanted = [Requirement(line) for line in lines]
    names = {normal(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
    return {name for name in names if name not in INSTALLERS and not CUDA.match(name)}


def test_the_first_part_pins_what_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = project["dependencies"] + project["optional-dependencies"]["dev"]
    direct = sections()[0]
    assert set(direct) == required_names(named)
    assert (direct["torch"], direct["deepspeed"]) == ("2.13.0", RANGE)


def test_what_a_pinned_package_brings_is_pinned() -> None:
    direct, brought = sections()
    assert not set(direct) & set(brought)
    pins = direct | brought
    missing, num_checked = {}, 0
    for name, version in pins.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # for another Python or system
            continue
        if version in (RANGE, installed.version.partition("+")[0]):
            num_checked += 1
            missing[name] = required_names(installed.requires or []) - set(pins)
    assert num_checked > len(direct)
    assert {name: names for name, names in missing.items() if names} == {}
