"""`megadlcm data preview | simulate`, as a user types them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline import read_index
from data_pipeline.errors import StorageError
from megadlcm.commands.main import main
from tests.support import paths
from tests.support.tiny_shards import write_numbered_folder

QUICKSTART = str(paths.QUICKSTART)
LENGTHS = [30, 5, 1, 20, 9, 44, 17, 12]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound shard folder of 146 stream tokens."""
    path = tmp_path / "shards"
    assert write_numbered_folder(path, LENGTHS, 40).num_stream_tokens == 146
    return path


def test_a_folder_and_a_config_that_names_it_show_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the name of the source."""
    assert main(["data", "preview", str(folder), "--seq-len", "16", "--samples", "4"]) == 0
    by_folder = capsys.readouterr().out
    assert len(re.findall(r"^sample \d", by_folder, re.MULTILINE)) == 4
    config = [QUICKSTART, f"data.train=[{{path: {folder}}}]", "data.seq_len=16", "data.seed=0"]
    assert main(["data", "preview", *config, "--samples", "4"]) == 0
    assert capsys.readouterr().out == by_folder
    assert main(["data", "preview", *config, "--start", "3", "--samples", "1"]) == 0
    (heading, *rest) = capsys.readouterr().out.splitlines()
    assert heading.startswith("sample 3: ") and "\n".join([heading, *rest]) in by_folder


def test_a_simulation_needs_no_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's length and batch come from the config."""
    tokens = read_index(folder).num_stream_tokens
    for path in folder.glob("shard-*"):
        path.unlink()
    words = [
        *(QUICKSTART, f"data.train=[{{path: {folder}, name: numbers}}]", "data.seq_len=16"),
        *("training.global_batch_size=8", "training.train_steps=5", "--samples", "30"),
    ]
    assert main(["data", "simulate", *words, "--data-parallel-size", "4"]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("numbers")).split()
    assert row[1:4] == ["1", "1", "30"] and row[6:8] == [str(tokens), "4"]
    assert "samples        0 to 29 of 40 of the run" in shown
    assert "steps          3 whole ones of 8 samples" in shown
    assert "data-parallel size 4" in shown and "3 whole epochs" in shown
    assert main(["data", "simulate", *words, "--start", "9", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert re.fullmatch(r"9  numbers  epoch 0  \[\d+, \d+\)  shard-\d{6}( shard-\d{6})*", lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview", "FOLDER", "--start", "-1"], "--start: -1 must be an integer >= 0"),
        (["preview", "FOLDER", "--samples", "0"], "--samples: 0 must be an integer >= 1"),
        (["preview", "FOLDER", "--width", "0"], "--width: 0 must be an integer >= 1"),
        (["preview", "FOLDER", "--seq-len", "0"], "--seq-len: 0 must be an integer >= 1"),
        (["preview", "FOLDER", "--split", "valid"], "--split valid: is for a config"),
        (["preview", "FOLDER", "data.seq_len=3"], "data.seq_len=3: is for a config"),
        (["preview", "FOLDER/.."], "has no index.json"),
        (["preview", QUICKSTART, "--seq-len", "8"], "give data.seq_len=8"),
        (["preview", QUICKSTART, "--cache-dir", "x"], "give data.cache_dir=x"),
        (["preview", "absent.yaml"], "absent.yaml: No such file"),
        (["preview", "memory://absent"], "memory://absent"),
        (
            ["simulate", QUICKSTART, "data.train=[{path: FOLDER}]", "--samples", "0"],
            "--samples: 0 must be an integer >= 1",
        ),
        (["simulate", QUICKSTART, "--data-parallel-size", "0"], "--data-parallel-size: 0 must"),
        (["simulate", QUICKSTART, "data.train=[]"], "data.train = []"),
        (["simulate", QUICKSTART, "data.train=[{path: absent}]"], "absent: does not exist"),
        (["inspect", "FOLDER", "--shards", "--urls"], "not allowed with"),
        (["verify", "FOLDER", "--workers", "0"], "--workers: 0 must be an integer >= 1"),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("FOLDER", str(folder)) for word in words]
    try:
        code = main(["data", *words])
    except SystemExit as end:  # argparse's own way
        assert isinstance(end.code, int)
        code = end.code
    assert code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not captured.out


def test_storage_that_fails_ends_in_one_line_and_exit_code_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no wrong input, and no defect whose traceback would help."""

    def broken(self: object, name: str) -> bytes:
        raise StorageError(f"{name}: cannot be read after 5 attempts; check the storage")

    monkeypatch.setattr("data_pipeline.storage.local.LocalFolder.read_bytes", broken)
    for words in (["inspect", str(folder)], ["preview", str(folder)], ["verify", str(folder)]):
        assert main(["data", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: index.json: cannot be read after 5 attempts")


def test_unread_shards_are_told_from_damaged_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the exit code too: nothing speaks for preparing the folder again."""

    def broken(self: object, name: str, size: int, sha256: bytes) -> None:
        raise StorageError(f"{name}: cannot be read after 5 attempts; check the storage")

    monkeypatch.setattr("data_pipeline.storage.local.LocalFolder.open", broken)
    assert main(["data", "verify", str(folder), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    shards = len(read_index(folder).shards)
    assert len(captured.out.splitlines()) == shards > 1
    assert f"not read: {shards} shards or files" in captured.err
    (folder / "shard-000000.tar").unlink()
    assert main(["data", "verify", str(folder), "--workers", "1"]) == 2
    assert f"problems found: {shards}" in capsys.readouterr().err


def test_the_list_of_tar_files_is_all_that_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made for other programs."""
    assert main(["data", "inspect", str(folder), "--urls"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == sorted(str(path) for path in folder.glob("*.tar"))
    assert not captured.err
    assert main(["data", "inspect", str(folder), "--shards"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(read_index(folder).shards)
