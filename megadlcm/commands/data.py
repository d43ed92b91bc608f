"""`megadlcm data preview | simulate`: the data of a run, as its config asks for it."""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.arguments import add_command, integer, local
from data_pipeline.commands.data import add_data_parser
from data_pipeline.errors import InputError
from data_pipeline.masking import is_url
from data_pipeline.tables import printable
from megadlcm.commands.arguments import add_config_arguments

if TYPE_CHECKING:
    from megadlcm.config import DataConfig

_PREVIEW_EXAMPLE = """\
examples:
  megadlcm data preview configs/quickstart.yaml --start 1000 --samples 2
  megadlcm data preview shards/mix --seq-len 512
  megadlcm data preview configs/dlcm_87m.yaml --split valid "data.train=[{path: DIR}]"

Sample numbers are those of a run that has not changed its sources."""

_SIMULATE_EXAMPLE = """\
examples:
  megadlcm data simulate configs/dlcm_87m.yaml --samples 1000000 --data-parallel-size 64
  megadlcm data simulate configs/quickstart.yaml --start 5000 --samples 20 --list

Reads the indexes of the train sources, not a byte of their shards. Sample numbers are those of a
run that has not changed its sources."""

DEFAULT_SAMPLES = 100_000


def add_parser(commands: Any) -> None:
    """Adds `data` and its commands; see `add_command`."""
    # data_pipeline has the commands that need no config of a run; these two read one
    commands = add_data_parser(commands)
    preview = add_command(
        commands, "preview", "decoded samples with their document borders", _PREVIEW_EXAMPLE
    )
    add_config_arguments(preview)
    preview.add_argument("--start", type=integer(0), default=0, metavar="N", help="first sample")
    preview.add_argument(
        "--samples", type=integer(1), default=3, metavar="N", help="how many (default: 3)"
    )
    preview.add_argument(
        "--split", choices=("train", "valid"), default="train", help="default: train"
    )
    preview.add_argument(
        "--width",
        type=integer(1),
        default=400,
        metavar="N",
        help="most characters of a piece that are shown (default: 400)",
    )
    preview.add_argument(
        "--seq-len", type=integer(1), metavar="N", help="tokens of a sample, for a shard folder"
    )
    preview.add_argument(
        "--cache-dir",
        type=local(str),
        metavar="DIR",
        help="local folder for copies of shards, for a URL",
    )
    preview.set_defaults(run=run_preview)

    simulate = add_command(
        commands, "simulate", "the order of a run, without reading shards", _SIMULATE_EXAMPLE
    )
    add_config_arguments(simulate)
    simulate.add_argument("--start", type=integer(0), default=0, metavar="N", help="first sample")
    simulate.add_argument(
        "--samples",
        type=integer(1),
        metavar="N",
        help=f"how many (default: {DEFAULT_SAMPLES:,}, or the rest of the run)",
    )
    simulate.add_argument(
        "--data-parallel-size", type=integer(1), default=1, metavar="D", help="default: 1"
    )
    simulate.add_argument("--list", action="store_true", help="print one line per sample")
    simulate.set_defaults(run=run_simulate)


def run_preview(arguments: argparse.Namespace) -> int:
    """Prints samples of a config or a shard folder; 0."""
    from data_pipeline.inspection.preview import preview_samples, render_sample

    data = _previewed(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a text may hold any character
    for sample in preview_samples(data, arguments.start, arguments.samples, arguments.split):
        print(render_sample(sample, arguments.width))
    return 0


def run_simulate(arguments: argparse.Namespace) -> int:
    """Prints what a stretch of a run reads; 0."""
    from data_pipeline.inspection.simulate import RunShape, Simulator, render_simulation
    from megadlcm.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    batch = config.training.global_batch_size
    shape = RunShape(batch, arguments.data_parallel_size, config.total_steps * batch)
    # as far as the run goes; a start behind its end is refused later, with its own line
    left = max(1, min(DEFAULT_SAMPLES, shape.train_samples - arguments.start))
    samples = left if arguments.samples is None else arguments.samples
    simulator = Simulator(config.data, arguments.start, samples)
    if arguments.list:
        for line in simulator.lines():
            print(printable(line))
    else:
        print(render_simulation(simulator.figures(shape), config.data, shape))
    return 0


def _previewed(arguments: argparse.Namespace) -> DataConfig:
    """Returns the data of a config; a folder or URL is one train source."""
    from megadlcm.config import DataConfig, SourceConfig, load_config

    location: str = arguments.config
    # a config is a file; what is a folder or a URL holds shards
    if not is_url(location) and not Path(location).is_dir():
        for name, key in (("seq-len", "seq_len"), ("cache-dir", "cache_dir")):
            value = getattr(arguments, key)
            if value is not None:
                raise InputError(
                    f"--{name} {value}: is for a shard folder, {location} is a config; "
                    f"give data.{key}={value}",
                    key=f"--{name}",
                )
        return load_config(location, arguments.overrides).data
    if arguments.split != "train" or arguments.overrides:
        option = " ".join(arguments.overrides) or f"--split {arguments.split}"
        raise InputError(f"{option}: is for a config, {location} is a shard folder; leave it out")
    data = DataConfig(train=(SourceConfig(location),), cache_dir=arguments.cache_dir)
    if arguments.seq_len is None:
        return data
    return replace(data, seq_len=arguments.seq_len)
