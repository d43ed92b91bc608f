"""The command line: exit codes, one-line errors, help with examples, no torch for a plan."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import pytest

from megadlcm import __version__
from megadlcm.commands.main import build_parser, main
from megadlcm.config import InputError, RunConfig
from megadlcm.training import pretrain
from tests.support import paths

QUICKSTART = str(paths.QUICKSTART)


def all_commands() -> list[list[str]]:
    """Every command and sub-command that the parser knows."""
    found = []
    todo: list[tuple[list[str], argparse.ArgumentParser]] = [([], build_parser())]
    while todo:
        words, parser = todo.pop()
        for action in parser._subparsers._group_actions if parser._subparsers else []:
            for name, child in action.choices.items():
                found.append([*words, name])
                todo.append(([*words, name], child))
    return found


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    example = capsys.readouterr().out.partition("\nexample")[2]
    assert "megadlcm " + " ".join(command) in example


def test_the_main_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    codes = capsys.readouterr().out.partition("exit codes: ")[2]
    assert re.findall(r"\d+", codes) == ["0", "1", "2", "130"]


def test_this_version_has_these_commands_and_no_others() -> None:
    names = {" ".join(command) for command in all_commands()}
    assert names == {
        "train",
        "plan",
        "data",
        "data tokenizer",
        "data prepare",
        "data inspect",
        "data verify",
        "data preview",
        "data simulate",
        "checkpoint",
        "checkpoint list",
        "checkpoint verify",
        "checkpoint inspect",
        "checkpoint diff",
        "checkpoint convert",
        "checkpoint pin",
        "checkpoint unpin",
        "quickstart",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "absent.yaml"], "absent.yaml: No such file"),
        (["plan", QUICKSTART, "model.d_tokn=1"], "did you mean model.d_token?"),
        (["plan", QUICKSTART, "--gpus-per-node", "7"], "is not a multiple"),
        (["plan", QUICKSTART, "--nodes", "0"], "must be an integer >= 1"),
        (["plan", QUICKSTART, "--mfu", "40"], "must be at most 1"),
        (["plan", QUICKSTART, "--frob"], "unknown argument --frob"),
        (["plan"], "required: CONFIG"),
        (["plan", QUICKSTART, "stray"], "override 'stray' must be key=value"),
        (["train", QUICKSTART, "checkpoint.keep_every=-1"], "checkpoint.keep_every = -1"),
        (["frob"], "invalid choice: 'frob'"),
        (["checkpoint", "list", "absent"], "absent"),
        (["data", "inspect", "a\x1b[2J\nerror: \u202eb"], "a\\x1b[2J\\nerror: \\u202eb"),
        (["plan", "configs/quickstart.yaml", "--a\x1b[2J\nb"], "--a\\x1b[2J\\nb"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_input_gives_exit_code_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: int | str | None = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


def test_overrides_may_stand_before_and_behind_an_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["training.train_steps=3", "--json", "data.seq_len=64", "seed=1"]
    assert main(["plan", QUICKSTART, *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["train_steps"] == 3
    assert plan["step_tokens"] % 64 == 0


def test_train_hands_the_resolved_run_over_and_returns_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[RunConfig] = []

    def run(config: RunConfig) -> int:
        seen.append(config)
        return 1

    monkeypatch.setattr(pretrain, "run", run)
    assert main(["train", QUICKSTART, "training.train_steps=7"]) == 1
    assert seen[0].training.train_steps == 7


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("key = 1, must be 2; write 2"), 2, "error: key = 1, must be 2; write 2"),
        (RuntimeError("boom"), 1, "error: RuntimeError: boom"),
        (RuntimeError("ftp://ada:secret@h"), 1, "error: RuntimeError: ftp://ada:***@h"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_failing_run_ends_in_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def run(config: RunConfig) -> int:
        raise error

    monkeypatch.setattr(pretrain, "run", run)
    assert main(["train", QUICKSTART]) == code
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1] == line
    assert ("Traceback" in printed) == (code == 1)
    assert ":secret@" not in printed


def test_help_and_plan_load_no_torch() -> None:
    program = (
        "import sys; from megadlcm.commands.main import main; code = main(sys.argv[1:]); "
        "loaded = {'torch', 'numpy', 'deepspeed'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    command = [sys.executable, "-c", program, "plan", QUICKSTART]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "megadlcm", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"megadlcm {__version__}\n"


def test_a_command_that_cannot_be_loaded_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packages above announce commands; one that is broken must not look like a fault of ours."""

    class Broken:
        def load(self) -> None:
            raise ImportError("no module named above")

    monkeypatch.setattr("megadlcm.commands.main._commands_above", lambda: [Broken()])
    assert main(["--help"]) == 1
    assert "error: ImportError: no module named above" in capsys.readouterr().err
    # a command of this package needs none of them
    assert main(["plan", QUICKSTART]) == 0
