"""The arguments of every command that reads a config."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and its overrides.

    Args:
        parser: parser of a command.
    """
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/dlcm_87m.yaml")
    # as words of their own and not as options: YAML values begin with brackets, quotes, signs
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted key and value in YAML; has precedence over the file",
    )
