"""`megadlcm train CONFIG`."""

from __future__ import annotations

import argparse
from typing import Any

from data_pipeline.commands.arguments import add_command
from megadlcm.commands.arguments import add_config_arguments

_EXAMPLE = """\
examples:
  megadlcm train configs/quickstart.yaml training.train_steps=50
  megadlcm train configs/quickstart.yaml "data.train=[{path: DIR, weight: 1.0, name: web}]"
  torchrun --nproc-per-node 8 -m megadlcm train configs/dlcm_87m.yaml

A run resumes by itself from the newest complete checkpoint in its output_dir."""


def add_parser(commands: Any) -> None:
    """Adds the command; see `add_command`."""
    parser = add_command(commands, "train", "train a model, or resume its run", _EXAMPLE)
    add_config_arguments(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from megadlcm.config import load_config
    from megadlcm.parallel.environment import quiet_torch

    # torch comes only after the config is known to be right: a typing error is answered at once
    # and not after seconds of imports on every process
    config = load_config(arguments.config, arguments.overrides)
    quiet_torch()
    from megadlcm.training import pretrain

    return pretrain.run(config)
