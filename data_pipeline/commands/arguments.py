"""How every command is added, and the values that its options take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from data_pipeline.masking import is_url

Local = TypeVar("Local")


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Adds a command with its help; the caller adds arguments and sets `run`.

    Args:
        commands: what argparse's add_subparsers returned (its type has no public name).
        name: of the command.
        summary: one phrase.
        example: shown below the options.

    Returns:
        Its parser. `run`, a default of it, is a function from the parsed arguments to an exit code.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        # Examples are laid out by hand; argparse would fill their lines.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A script that abbreviates would break, or change its meaning, with the next new option.
        allow_abbrev=False,
    )
    return parser


def integer(least: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least so much."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            # No integer and too small an integer are the same mistake, told in the same words.
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} must be an integer >= {least}")
        return number

    return parse


def local(kind: Callable[[str], Local]) -> Callable[[str], Local]:
    """The type of an option that is a file or folder, of this kind, and cannot be a URL."""

    def parse(text: str) -> Local:
        if is_url(text):
            raise argparse.ArgumentTypeError(
                f"{text} must be a local path, not a URL; name a file or folder that is mounted "
                "here"
            )
        return kind(text)

    return parse


def positive(text: str) -> float:
    """The type of an option that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    # Written so that nan, which compares false to everything, is refused too.
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number > 0")
    return number


def share(text: str) -> float:
    """The type of an option that is a share, above 0 and at most 1."""
    number = positive(text)
    if number > 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be at most 1; it is a share")
    return number
