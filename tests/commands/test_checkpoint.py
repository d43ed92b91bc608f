"""`megadlcm checkpoint ...` on checkpoints that no run wrote: tables, JSON, and odd folders."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from megadlcm.commands.main import main
from tests.support.damage import flip_bit
from tests.support.made_checkpoints import SMALL, make_checkpoint
from tests.support.paths import ROOT

Call = Callable[..., str]
GOLDEN = ROOT / "tests" / "golden" / "run_of_format_0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints 1 to 3."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Call:
    """Function(*words, code=0) -> what `megadlcm checkpoint WORDS` prints."""

    def call(*words: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["checkpoint", *map(str, words)]) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert printed.err.count("\n") == (1 if code else 0), printed.err
        return printed.out if not code or printed.out else printed.err

    return call


def damaged(run: Path, step: int, file: str = "rank_00001.safetensors") -> Path:
    folder = run / "checkpoints" / f"step_{step:010d}"
    flip_bit(folder / file)
    return folder


def test_list_shows_what_there_is_newest_first(run: Path, said: Call) -> None:
    (run / "checkpoints" / "step_0000000003" / "state.json").unlink()
    written = (datetime.now(UTC) - timedelta(hours=5, minutes=3)).isoformat(timespec="seconds")
    make_checkpoint(run / "checkpoints", 2, num_files=3, written=written)
    said("pin", run, "1")
    header, *rows = said("list", run).splitlines()
    assert header.split() == ["step", "size", "files", "layout", "age", "status"]
    assert [row.split()[0] for row in rows] == ["3", "2", "1"]
    assert "damaged: state.json is missing" in rows[0]
    size = sum(f.stat().st_size for f in (run / "checkpoints/step_0000000002").iterdir()) / 1e6
    assert 0 <= size - float(rows[1].split()[1]) < 0.1 and " MB " in rows[1]
    assert rows[1].split()[3:] == [
        "5",
        "tp1",
        "pp1",
        "dp3",
        "zero1",
        "5",
        "h",
        "complete,",
        "newest",
    ]
    assert rows[2].endswith("complete, pinned")


def test_list_says_the_same_as_json(run: Path, said: Call) -> None:
    (run / "checkpoints" / "step_0000000003" / "manifest.json").write_text("{")
    said("pin", run, "1")
    values = json.loads(said("list", run, "--json"))
    assert values["run_dir"] == str(run)
    three, two, one = values["checkpoints"]
    assert three["status"] == "damaged" and "manifest.json" in three["problem"]
    assert three["bytes"] is None and not three["newest"]
    assert two["newest"] and two["status"] == "complete" and not two["pinned"]
    assert two["files"] == 4 and two["layout"]["world_size"] == 2 and two["age_seconds"] is not None
    assert one["pinned"] and not one["newest"] and one["step"] == 1
    assert one["path"] == str(run / "checkpoints" / "step_0000000001")


def test_list_reads_nothing_but_manifests(run: Path, said: Call) -> None:
    for folder in (run / "checkpoints").glob("step_*"):
        for file in folder.iterdir():
            if file.name != "manifest.json":
                flip_bit(file)
    assert said("list", run).count("complete") == 3


def test_list_of_odd_things_dies_of_none(run: Path, said: Call) -> None:
    root = run / "checkpoints"
    (root / "latest").write_bytes(b"\xff\xfe\x00\x1b[2J")
    (root / "step_0000000004").symlink_to("nowhere")
    (root / "step_0000000005").write_text("a file")
    (root / "step_0000000006").symlink_to("step_0000000006")
    (root / "step_0000000007").symlink_to("step_0000000001")
    (root / "step_0000000008").mkdir()
    for name in ("step_9", "a\nb", "\u202e", "step_0000000001.old", "[bold]"):
        (root / name).mkdir()
    with socket.socket(socket.AF_UNIX) as end, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        end.bind("step_0000000009")
    rows = said("list", run).splitlines()[1:]
    assert [row.split()[0] for row in rows] == [str(step) for step in range(9, 0, -1)]
    assert ["damaged: " in row for row in rows] == [True] * 6 + [False] * 3
    assert "renamed" in rows[2] and rows[6].endswith("complete, newest")
    (root / "latest").unlink()
    (root / "latest").symlink_to("nowhere")
    (root / "pins").write_bytes(b"\xff")
    assert len(said("list", run).splitlines()) == 10
    assert said("verify", run, code=2).count("DAMAGED") == 6


def test_list_of_a_run_that_saved_nothing_says_so(tmp_path: Path, said: Call) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint yet" in said("list", tmp_path)
    assert json.loads(said("list", tmp_path, "--json"))["checkpoints"] == []
    assert "has no folder 'checkpoints'" in said("list", tmp_path / "checkpoints", code=2)


def test_verify_approves_what_is_whole(run: Path, said: Call) -> None:
    for options in ([], ["--quick"]):
        rows = said("verify", run, *options).splitlines()
        assert [row.split()[0] for row in rows] == ["ok"] * 3


def test_verify_names_what_is_damaged_and_exits_with_2(
    run: Path, said: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(run, 2)
    assert said("verify", run, "--quick").count("ok") == 3
    assert main(["checkpoint", "verify", str(run)]) == 2
    printed = capsys.readouterr()
    rows = printed.out.splitlines()
    assert [row.split()[0] for row in rows] == ["ok", "DAMAGED", "ok"]
    assert str(folder) in rows[1] and "rank_00001.safetensors: block 0 " in rows[1]
    assert f"{run / 'checkpoints'}: 1 of 3 checkpoints damaged" in printed.err
    values = json.loads(said("verify", run, "--json", code=2))["checkpoints"]
    assert [each["status"] for each in values] == ["ok", "damaged", "ok"]
    assert "block 0" in values[1]["problem"] and values[0]["bytes"] > 9000
    # one of them by its folder
    assert said("verify", run / "checkpoints" / "step_0000000001").split()[0] == "ok"
    assert "DAMAGED" in said("verify", folder, code=2)


def test_verify_calls_a_removed_one_gone(
    run: Path, said: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megadlcm.checkpoint.storage import LocalStorage

    exact = LocalStorage.read

    def removed(self: LocalStorage, name: str, *arguments: Any) -> int:
        if name.endswith("1") and name in self.names():
            self.remove(name, "0" * 32)
        return exact(self, name, *arguments)

    monkeypatch.setattr(LocalStorage, "read", removed)
    rows = said("verify", run).splitlines()
    assert [row.split()[0] for row in rows] == ["ok", "ok", "gone"]
    assert "removed meanwhile" in rows[2]


def test_verify_knows_the_first_format(tmp_path: Path, said: Call) -> None:
    shutil.copytree(GOLDEN / "checkpoints", tmp_path / "checkpoints")
    for options in ([], ["--quick"]):
        assert said("verify", tmp_path, *options).split()[0] == "ok"
    assert "complete, newest" in said("list", tmp_path)
    assert "step 4: " in said("inspect", tmp_path)
    flip_bit(tmp_path / "checkpoints" / "step_0000000004" / "optimizer.safetensors")
    assert "SHA-256" in said("verify", tmp_path, code=2)
    (tmp_path / "checkpoints" / "step_0000000004" / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors is missing" in said("verify", tmp_path, "--quick", code=2)


def test_inspect_shows_every_tensor_from_the_index(run: Path, said: Call) -> None:
    text = said("inspect", run)
    assert text.startswith(
        f"{run / 'checkpoints' / 'step_0000000003'}\nstep 3: 4 files of format 2"
    )
    assert "train_state: step=3, consumed_samples=12" in text
    assert "versions: torch=0" in text
    assert "bytes: master=3,236, exp_avg=3,232, exp_avg_sq=3,232, other=" in text
    rows = {row.split()[0]: row.split() for row in text.splitlines()[7:-1]}
    assert rows["embedding"] == ["embedding", "[50,", "8]", "400", "1"]
    assert rows["norm"][-1] == "2" and rows["threshold"][1:] == ["[]", "1", "1"]
    assert text.endswith("4 tensors, 809 values\n")
    values = json.loads(said("inspect", run / "checkpoints" / "step_0000000002", "--json"))
    assert values["step"] == 2 and [each["name"] for each in values["tensors"]] == list(SMALL)
    folder = run / "checkpoints" / "step_0000000002"
    manifest = (folder / "manifest.json").stat().st_size
    sizes = sum(file.stat().st_size for file in folder.iterdir())
    assert sum(values["bytes"].values()) == sizes - manifest


def test_inspect_takes_the_newest_good_one_and_says_what_it_passed_over(
    run: Path, said: Call, caplog: pytest.LogCaptureFixture
) -> None:
    damaged(run, 3, "index.safetensors")
    assert "step_0000000002\n" in said("inspect", run)
    assert "passed over damaged checkpoint" in caplog.text and "index.safetensors" in caplog.text
    line = said("inspect", run / "checkpoints" / "step_0000000003", code=2)
    assert "index.safetensors: block 0" in line and "name another checkpoint" in line


def test_diff_names_tensors_and_kinds_without_reading_data(run: Path, said: Call) -> None:
    one, other = (run / "checkpoints" / f"step_000000000{step}" for step in (1, 2))
    for folder in (one, other):
        damaged(run, int(folder.name[-1]))  # nobody looks
    text = said("diff", one, other)
    rows = dict(line.split(None, 1) for line in text.splitlines()[1:5])
    assert rows["embedding"] == "master, exp_avg, exp_avg_sq" and rows["threshold"] == "master"
    assert "step: 1 and 2" in text and "0 tensors are bit-equal, 4 differ" in text
    assert "4 tensors are bit-equal, 0 differ" in said("diff", one, one)
    values = json.loads(said("diff", one, other, "--json"))
    assert values["steps"] == [1, 2] and not values["equal"]
    assert values["counters"]["consumed_samples"] == [4, 8]
    assert json.loads(said("diff", run, run, "--json"))["equal"]


def test_diff_of_other_layouts_is_none(run: Path, tmp_path: Path, said: Call) -> None:
    make_checkpoint(tmp_path / "other" / "checkpoints", 3, num_files=5)
    assert "4 tensors are bit-equal, 0 differ" in said("diff", run, tmp_path / "other")


def test_diff_says_what_it_cannot_compare(run: Path, tmp_path: Path, said: Call) -> None:
    shapes = {"embedding": (50, 9), "norm": (8,), "extra": (2,)}
    make_checkpoint(tmp_path / "other" / "checkpoints", 3, shapes)
    text = said("diff", run, tmp_path / "other")
    assert "shapes (50, 8) and (50, 9)" in text
    rows = dict(line.split(None, 1) for line in text.splitlines()[1:])
    assert rows["head"] == "only in the first" and rows["extra"] == "only in the second"
    assert "1 tensors are bit-equal" in text
    text = said("diff", run, GOLDEN)
    assert "values unknown: the second has no fingerprints" in text and "bit-equal" not in text
    assert not json.loads(said("diff", GOLDEN, GOLDEN, "--json"))["equal"]


def test_convert_writes_what_can_be_converted_again(run: Path, tmp_path: Path, said: Call) -> None:
    line = said("convert", run, tmp_path / "eight", "--files", "8")
    assert line.startswith(f"{tmp_path / 'eight'}: step 3, 10 files, ")
    said("convert", tmp_path / "eight", tmp_path / "whole", "--consolidated", "--optimizer")
    values = json.loads(said("convert", tmp_path / "whole", tmp_path / "one", "--json"))
    assert values["step"] == 3 and "rank_00000.safetensors" in values["files"]
    assert "rank_00001.safetensors" not in values["files"]
    for folder in ("eight", "whole", "one"):
        assert json.loads(said("diff", run, tmp_path / folder, "--json"))["equal"]
        assert said("verify", tmp_path / folder).split()[0] == "ok"
    said("convert", run, tmp_path / "model", "--consolidated")
    assert "embedding  exp_avg, exp_avg_sq" in said("diff", run, tmp_path / "model")


def test_convert_refuses_in_one_line(run: Path, tmp_path: Path, said: Call) -> None:
    assert "exists, must be a new folder" in said("convert", run, run, code=2)
    assert "--consolidated" in said("convert", run, tmp_path / "x", "--optimizer", code=2)
    assert "its name says step 1" in said("convert", run, tmp_path / "step_0000000001", code=2)
    damaged(run, 3)
    assert "rank_00001.safetensors: block 0" in said("convert", run, tmp_path / "x", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", "convert", str(run), "x", "--files", "0"])
    assert stop.value.code == 2


def test_pins_are_written_and_taken_away(run: Path, said: Call) -> None:
    pins = run / "checkpoints" / "pins"
    assert said("pin", run, "3", "step_0000000001") == "pinned: step_0000000001, step_0000000003\n"
    assert pins.read_text() == "step_0000000001\nstep_0000000003\n"
    assert json.loads(said("pin", run, "2", "--json"))["pinned"][1] == "step_0000000002"
    assert said("unpin", run, "3", "2") == "pinned: step_0000000001\n"
    # one that is gone can be unpinned
    shutil.rmtree(run / "checkpoints" / "step_0000000001")
    assert said("unpin", run, "1") == "pinned: none\n"
    assert "holds no step_0000000001; see megadlcm checkpoint list" in said("pin", run, "1", code=2)
    assert "is not pinned (pinned: none)" in said("unpin", run, "2", code=2)
    assert "must be a step such as 100" in said("pin", run, "../x", code=2)
    pins.write_bytes(b"\xff")
    assert "pins cannot be read" in said("pin", run, "2", code=2)


@pytest.mark.parametrize("words", [["pin", "RUN", "2"], ["list", "RUN"], ["diff", "RUN", "RUN"]])
def test_commands_read_no_torch(run: Path, words: list[str]) -> None:
    """They are for login nodes; loading torch takes seconds."""
    code = (
        "import sys\nfrom megadlcm.commands.main import main\n"
        f"assert main({['checkpoint', *(str(run) if w == 'RUN' else w for w in words)]!r}) == 0\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules), 'torch was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
