"""From nothing to a trained, evaluated DLCM: the commands that a user would type, one by one.

Every quickstart makes its data again, which takes seconds, and trains from scratch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.commands.arguments import add_command, integer, local
from data_pipeline.errors import InputError

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
_DOMAINS = ("en", "code")
_VOCAB_SIZE = 4096
_CODE_BYTES = 6_000_000
_EXAMPLE = """\
examples:
  megadlcm quickstart
  megadlcm quickstart --folder runs/short training.train_steps=50"""


def add_parser(commands: Any) -> None:
    """Adds the command; see `add_command`."""
    summary = "text of this Python's library -> tokenizer -> shards -> training -> report"
    parser = add_command(commands, "quickstart", summary, _EXAMPLE)
    parser.add_argument(
        "--folder",
        type=local(Path),
        default=Path("runs/quickstart"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--code-bytes",
        type=integer(1),
        default=_CODE_BYTES,
        metavar="N",
        help="about how much source code the corpus has (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of configs/quickstart.yaml"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Builds the corpus, trains, evaluates and prints a report; 0."""
    from launchers.quickstart.report import print_report
    from megadlcm.config import load_config

    start = time.monotonic()
    if any(override.startswith("output_dir=") for override in arguments.overrides):
        text = "output_dir is the folder `run` of --folder; give that instead"
        raise InputError(text, key="output_dir")
    folder: Path = arguments.folder
    overrides = [f"output_dir={folder / 'run'}", *arguments.overrides]
    load_config(_CONFIG, overrides)  # a slip of the pen must not cost the earlier run
    _remove_earlier_run(folder / "run")
    # as commands of their own, shown as they run: what a user would type, in processes of its own
    data = _prepare_data(folder / "data", arguments.code_bytes)
    _megadlcm("train", str(_CONFIG), *data, *overrides)
    print_report(folder / "run", time.monotonic() - start)
    return 0


def _remove_earlier_run(run_folder: Path) -> None:
    """Removes what an earlier quickstart left; raises InputError where that is no run folder."""
    from megadlcm.run_folder.owner import holding
    from megadlcm.run_folder.start import is_run_folder

    if not run_folder.exists():
        return
    if run_folder.is_symlink() or not is_run_folder(run_folder):
        raise InputError(
            f"{run_folder} is not the folder of a run and stays as it is; choose another --folder",
            key="--folder",
        )
    with holding(run_folder):  # refused where it is still training
        print(f"removing the earlier run in {run_folder}", flush=True)
        shutil.rmtree(run_folder)


def _prepare_data(folder: Path, code_bytes: int) -> list[str]:
    """Makes text, tokenizer and shards, whatever is there; returns the config overrides."""
    from launchers.quickstart.standard_library_text import write_corpus

    print(f"writing the text of this Python's standard library to {folder}", flush=True)
    texts = write_corpus(folder / "text", code_bytes)
    tokenizer = folder / "tokenizer.json"
    inputs = [f"--input={texts[f'{domain}_train']}" for domain in _DOMAINS]
    options = (f"--vocab-size={_VOCAB_SIZE}", f"--output={tokenizer}", "--overwrite")
    _megadlcm("data", "tokenizer", *inputs, *options)
    sources: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for split, entries in sources.items():
        for domain in _DOMAINS:
            # a folder for each: held-out text must be a source of its own
            shards = folder / f"{domain}_{split}"
            entries.append({"path": str(shards), "weight": 1.0, "name": domain})
            _megadlcm(
                "data", "prepare", f"--input={texts[f'{domain}_{split}']}",
                f"--tokenizer={tokenizer}", f"--output={shards}", "--shard-tokens=500000",
                "--overwrite",
            )  # fmt: skip
    return [f"data.{split}={json.dumps(entries)}" for split, entries in sources.items()]


def _megadlcm(*arguments: str) -> None:
    """Runs one command of the command line, showing it first."""
    print(f"\n$ megadlcm {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megadlcm", *arguments], check=False)
    # its own line says what was wrong; the code tells scripts
    if done.returncode != 0:
        raise SystemExit(done.returncode)
