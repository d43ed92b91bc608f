"""Wrong input: exit code 2 and one line, before a process group or a run folder exists."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import open_samples, read_index
from data_pipeline.shard_format.table import decode_table
from megadlcm.commands.main import main
from megadlcm.config import load_config
from megadlcm.model import build_model
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.run_folder.rows import read_rows
from megadlcm.training import pretrain
from tests.support.checkpoints import problems
from tests.support.damage import change_index
from tests.support.tiny_runs import VOCAB_SIZE
from tests.support.train_processes import START_SECONDS, start_command

Refused = Callable[..., str]  # function(*words) -> the line that `megadlcm WORDS` says
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
UNDIVIDED = "training.global_batch_size = 4 is not a multiple"

WEIGHTS = {"heavy": 1.0, "light": 1e-4, "other": 0.5}


@pytest.fixture
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose run comes as far as the process group."""

    def join(*_: object) -> ParallelMesh:
        raise AssertionError("joined a process group")

    monkeypatch.setattr(pretrain, "join_process_group", join)


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the training shards, to be damaged."""
    return Path(shutil.copytree(corpus / "train", tmp_path / "shards"))


def source(folder: Path) -> str:
    """Override that trains on a folder."""
    return f"data.train=[{{path: {folder}, name: shards}}]"


def flip(path: Path, offset: int) -> None:
    """Changes a bit of a file; done twice, it is whole again."""
    contents = bytearray(path.read_bytes())
    contents[offset] ^= 1
    path.write_bytes(contents)


@pytest.mark.usefixtures("no_group")
def test_right_input_does_come_to_the_process_group(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests below that forbid one would notice it."""
    assert main(["train", str(run_file)]) == 1
    assert "joined a process group" in capsys.readouterr().err
    assert (run_file.parent / "run").is_dir()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.d_tokn=3", ["model.d_tokn", "did you mean model.d_token?"]),
        ("traning.train_steps=3", ["traning", "did you mean training?"]),
        ("data.seq_len=abc", ['data.seq_len = "abc"', "an integer", "as in 4096"]),
        ("data.train=shards", ['data.train = "shards"', "a list", "in brackets"]),
        ("data.train", ["'data.train'", "key=value", "for example"]),
        ("data.train=[]", ["data.train = []", "give at least one"]),
        ("model.token_heads=3", ["d_token = 16", "token_heads = 3", "even integer", "change one"]),
        ("model.token_kv_heads=4", ["token_heads = 2", "token_kv_heads = 4"]),
        ("model.target_tokens_per_concept=1", ["concept = 1.0", "> 1", "architecture: dense"]),
        ("model.vocab_size=290", ["model.vocab_size = 290", "token 299", "set", ">= 300"]),
        ("model.boundary_mode=learnd_global", ["did you mean learned_global?"]),
        ("training.micro_batch_size=3", [UNDIVIDED, "training.micro_batch_size = 3"]),
        ("training.train_steps=0", ["training.train_steps = 0", ">= 1"]),
        ("training.precision=fp8", ['training.precision = "fp8"', "one of fp32, bf16"]),
        (
            "parallel.tensor_parallel_size=2",
            ["model.token_kv_heads = 1", "tensor_parallel_size = 2", "must be divisible"],
        ),
        ("data.tokenizer=absent.json", ["absent.json", "no such file", "data tokenizer"]),
        (
            "output_dir=s3://bucket/run",
            ['output_dir = "s3://bucket/run"', "a local path", "name a"],
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_rule_and_way_out(
    run_file: Path, refused: Refused, override: str, named: list[str]
) -> None:
    line = refused("train", run_file, override)
    assert [part for part in named if part not in line] == []
    assert not (run_file.parent / "run").exists()


@pytest.mark.usefixtures("no_group")
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a CUDA device is here; hide it with CUDA_VISIBLE_DEVICES=",
)
@pytest.mark.parametrize("backend", ["flash_attn", "varlen"])
def test_an_attention_back_end_that_cannot_run_here_is_refused(
    run_file: Path, refused: Refused, backend: str
) -> None:
    line = refused("train", run_file, f"model.attention_backend={backend}")
    assert f"model.attention_backend={backend} needs CUDA" in line
    assert "choose auto or reference" in line
    assert not (run_file.parent / "run").exists()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, [UNDIVIDED, "2 * 3", "change one"]),
        ({"RANK": "0", "WORLD_SIZE": "many", "LOCAL_RANK": "0"}, ["WORLD_SIZE", "torchrun"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK = 2", "WORLD_SIZE = 2"]),
        ({"RANK": "0", "WORLD_SIZE": "\u00b2", "LOCAL_RANK": "0"}, ["WORLD_SIZE = '\u00b2'"]),
        (TWO | {"MASTER_PORT": "abc"}, ["MASTER_PORT = 'abc'", "from 1 to 65535"]),
        (TWO | {"MASTER_PORT": "70000"}, ["MASTER_PORT = '70000'", "from 1 to 65535"]),
        (TWO | {"MASTER_ADDR": "a b"}, ["MASTER_ADDR = 'a b'", "the host of rank 0"]),
        (TWO | {"DS_ACCELERATOR": "gpu"}, ["DS_ACCELERATOR = 'gpu'", "cpu or cuda"]),
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "1",
                "RANK": "0",
                "WORLD_SIZE": "1",
            },
            ["WORLD_SIZE = 1", "SLURM_STEP_NUM_TASKS = 2", "unset RANK and WORLD_SIZE"],
        ),
    ],
)
def test_a_launcher_that_does_not_fit_the_run_is_refused_before_anyone_waits(
    run_file: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    named: list[str],
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    line = refused("train", run_file)
    assert [part for part in named if part not in line] == []
    assert not (run_file.parent / "run").exists()


def test_the_exit_code_and_the_line_are_those_of_the_process(run_file: Path) -> None:
    """Nothing imported on the way adds a line; a rank alone does not wait for the other one."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": ""}
    for words, environment, named in (
        (["model.d_tokn=3"], {}, "did you mean model.d_token?"),
        ([], launched, "MASTER_ADDR is empty"),
    ):
        process = start_command("train", run_file, *words, **environment)
        printed, line = process.communicate(timeout=START_SECONDS)
        assert (process.returncode, printed, line.count("\n")) == (2, "", 1)
        assert line.startswith("error: ") and named in line


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/run", "locked/run"])
def test_an_output_dir_that_cannot_be_written_is_refused(
    run_file: Path, refused: Refused, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    if place == "locked/run":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere; run the tests as another user")
        (tmp_path / "locked").mkdir(mode=0o555)
    line = refused("train", run_file, f"output_dir={tmp_path / place}")
    assert f"output_dir = {tmp_path / place}: must be a folder that can be written to" in line
    assert "choose another one" in line


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("command", [["train"], ["plan"], ["data", "simulate"]])
def test_a_source_that_is_too_light_is_refused_before_anything_is_built(
    run_file: Path, refused: Refused, corpus: Path, command: list[str]
) -> None:
    sources = [f"{{path: {corpus / 'train'}, name: {n}, weight: {w}}}" for n, w in WEIGHTS.items()]
    line = refused(*command, run_file, f"data.train=[{', '.join(sources)}]")
    assert "data.train[1].weight = 0.0001 (light), must be at least 1/4096 of the sum" in line
    assert "raise it or leave the source out" in line
    assert not (run_file.parent / "run").exists()


def damage(shards: Path, kind: str) -> None:
    """Damages a shard folder so that it shows without reading the shards."""
    tar = shards / "shard-000000.tar"
    contents = tar.read_bytes()
    if kind == "missing folder":
        shutil.rmtree(shards)
    elif kind == "unfinished folder":
        (shards / "index.json").unlink()
    elif kind == "broken index":
        (shards / "index.json").write_text((shards / "index.json").read_text()[:99])
    elif kind == "missing shard":
        tar.unlink()
    elif kind == "truncated shard":
        tar.write_bytes(contents[: len(contents) // 2])
    elif kind == "overwritten header":
        tar.write_bytes(bytes(4096) + contents[4096:])
    elif kind == "missing table":
        (shards / "shard-000000.documents.npy").unlink()
    elif kind == "another tokenizer":
        flip(shards / "tokenizer.json", 100)


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing folder", ["does not exist", "megadlcm data prepare"]),
        ("unfinished folder", ["has no index.json", "megadlcm data prepare"]),
        ("broken index", ["index.json", "cannot be read", "megadlcm data prepare"]),
        ("missing shard", ["shard-000000.tar: missing", "prepare it again"]),
        ("truncated shard", ["shard-000000.tar", "bytes", "were written", "prepare it again"]),
        ("overwritten header", ["shard-000000.tar", "byte 0", "prepare it again"]),
        ("missing table", ["shard-000000.documents.npy: missing", "prepare it again"]),
        ("another tokenizer", ["tokenizer.json", "put that one back"]),
    ],
)
def test_a_damaged_shard_folder_is_named_before_the_first_step(
    run_file: Path, refused: Refused, shards: Path, kind: str, named: list[str]
) -> None:
    """As training data and as held-out data."""
    damage(shards, kind)
    for override in (source(shards), source(shards).replace("train", "valid")):
        line = refused("train", run_file, override)
        assert [part for part in [str(shards), *named] if part not in line] == []
    assert not (run_file.parent / "run").exists()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["domains"], []),
        (["domains", "en", "tokens"], 0),
        (["eos_id"], 10**6),
        (["eos_id"], None),
        (["max_token_id"], "299"),
        (["num_tokens"], 3.5),
        (["shards_sha256"], 7),
        (["shards_sha256"], "0" * 64),
        (["version"], 99),
    ],
)
def test_an_index_with_a_wrong_entry_is_named(
    run_file: Path, refused: Refused, shards: Path, keys: list[Any], value: Any
) -> None:

    def change(entry: dict[str, Any]) -> None:
        for key in keys[:-1]:
            entry = entry[key]
        assert keys[-1] in entry
        entry[keys[-1]] = value

    change_index(shards, change)
    for words in (["train", run_file, source(shards)], ["data", "inspect", shards]):
        assert str(shards / "index.json") in refused(*words)


@pytest.mark.usefixtures("no_group")
def test_a_tokenizer_that_is_not_the_shards_is_refused(
    run_file: Path, refused: Refused, corpus: Path, shards: Path, tmp_path: Path
) -> None:
    """Given by name, kept with the other shards, or no tokenizer at all."""
    other = tmp_path / "other.json"
    options = ("--input", corpus / "train.jsonl", "--output")
    assert main(list(map(str, ["data", "tokenizer", *options, other, "--vocab-size", 280]))) == 0
    line = refused("train", run_file, f"data.tokenizer={other}")
    assert f"data.tokenizer = {other}: not the tokenizer" in line and "leave it out" in line
    words = ["data", "prepare", *options, shards, "--overwrite", "--tokenizer", other]
    assert main(list(map(str, words))) == 0
    line = refused("train", run_file, source(shards))
    assert "different tokenizers" in line and "the same --tokenizer" in line
    line = refused("train", run_file, f"data.tokenizer={run_file}")
    assert str(run_file) in line and "not a tokenizer.json" in line


def document_read_last(run_file: Path, shards: Path) -> tuple[int, int]:
    """The document whose first token is trained last, and the step that reads it."""
    config = load_config(run_file, [source(shards)])
    first_sample: dict[str, int] = {}
    for sample in islice(open_samples(config.data), 200):
        for name in sample.document_ids:
            first_sample.setdefault(name, sample.index)
    name, sample_number = max(first_sample.items(), key=lambda item: item[1])
    return int(name.removeprefix("train")), sample_number // config.training.global_batch_size + 1


def test_a_flipped_token_is_found_when_it_is_read_and_what_was_saved_is_good(
    run_file: Path, refused: Refused, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be known before; the run goes on once the file is whole again."""
    document, step = document_read_last(run_file, shards)
    shard = read_index(shards).shards[0]
    tar, table = shards / shard.tar_name, shards / shard.table_name
    token = int(decode_table(table.read_bytes()).rows["tokens_offset"][document]) + 2
    flip(tar, token)
    words = ["train", run_file, source(shards), f"training.train_steps={step}", "data.valid=[]"]
    line = refused(*words)
    assert f"{tar}: damaged, document {document}" in line and "megadlcm data verify" in line
    folder = run_file.parent / "run"
    assert [row["step"] for row in read_rows(folder)] == list(range(1, step))
    assert line.removeprefix("error: ") in (folder / "logs" / "rank_0000.log").read_text()
    found = problems(folder)
    assert found and not any(found.values())
    flip(tar, token)
    assert main([str(word) for word in words]) == 0
    assert f"from step {max(found)} " in capsys.readouterr().out
    assert [row["step"] for row in read_rows(folder)] == list(range(1, step + 1))


def test_a_resumed_run_may_not_become_another_one(run_file: Path, refused: Refused) -> None:
    """Nor does the attempt change anything in the run folder but its log."""
    assert main(["train", str(run_file), "training.train_steps=2"]) == 0
    folder = run_file.parent / "run"
    kept = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")}
    for override, named in (
        ("model.d_token=32", "model.d_token (16 -> 32)"),
        ("seed=1", "seed (0 -> 1)"),
        ("data.seq_len=16", "data.seq_len (32 -> 16)"),
        ("training.precision=bf16", "training.precision ('fp32' -> 'bf16')"),
    ):
        line = refused("train", run_file, override)
        assert named in line and "step_0000000002" in line and "choose a new output_dir" in line
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_pack_with_an_empty_document_is_refused(run_file: Path) -> None:
    model = build_model(load_config(run_file).model)
    tokens_T = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="document 1 with 0 rows; every document needs"):
        model(tokens_T, torch.tensor([0, 3, 3, 5], dtype=torch.int32))
    assert model(tokens_T, torch.tensor([0, 3, 5])).logits_TV.shape == (5, VOCAB_SIZE)


def test_a_reader_that_has_seen_enough_leaves_no_traceback(run_file: Path) -> None:
    """As in `megadlcm plan run.yaml | head -1`."""
    process = start_command("plan", run_file)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    line = process.communicate(timeout=START_SECONDS)[1]
    assert process.returncode == 1
    assert line.startswith("error: the output was closed") and line.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_output_on_a_full_disk_is_a_failure_in_one_line(run_file: Path, command: str) -> None:
    words = [sys.executable, "-m", "megadlcm", command, str(run_file)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    line = done.stderr
    assert done.returncode == 1
    assert line.startswith("error: the output cannot be written (No space left on device); send")
    assert line.count("\n") == 1
