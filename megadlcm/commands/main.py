"""The command line; each command loads what it needs only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.errors import InputError, StorageError
from data_pipeline.masking import masked
from data_pipeline.output_folder import FULL
from data_pipeline.tables import printable
from megadlcm import __version__
from megadlcm.commands import checkpoint, data, plan, train

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_COMMANDS = {"train": train, "plan": plan, "data": data, "checkpoint": checkpoint}
# packages above this one announce their commands under this name when they are installed
_COMMANDS_ABOVE = "megadlcm.commands"

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130

_EXAMPLES = """\
examples:
  megadlcm plan configs/dlcm_2.3b.yaml --nodes 16 --gpus-per-node 8
  megadlcm train configs/quickstart.yaml

exit codes: 0 done, 1 failed while running, 2 the input was wrong or is damaged, 130 Ctrl-C"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as every other wrong input."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", None, _StoreOnce)  # what an option without an action does

    def error(self, message: str) -> NoReturn:
        _say_error(f"{message}; see {self.prog} --help")
        raise SystemExit(EXIT_WRONG_INPUT)


class _StoreOnce(argparse.Action):
    """Stores a value; refuses an option given twice, one of whose values would be lost."""

    _given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores the value."""
        if option_string and self._given:
            parser.error(f"{option_string} is given twice, must be given once; remove one")
        self._given = True
        setattr(namespace, self.dest, values)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        Exit code: 0 done, 1 failed while running, 2 the input was wrong or is damaged,
        130 interrupted from the keyboard.
    """
    try:
        arguments = _parse(argv)
        code = int(arguments.run(arguments))
        if not code:
            sys.stdout.flush()  # here, where a closed pipe still has an answer
        return code
    except BrokenPipeError as error:
        return _lost_output(f"was closed ({error})")
    except InputError as error:
        _say_error(str(error))
        return EXIT_WRONG_INPUT
    except StorageError as error:
        _say_error(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        _say_error("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        # whatever writes a file says so itself
        if isinstance(error, OSError) and error.errno in FULL:
            return _lost_output(f"cannot be written ({error.strerror}); send it to another place")
        print(masked(traceback.format_exc()), end="", file=sys.stderr)
        _say_error(f"{type(error).__name__}: {error}")
        return EXIT_FAILED


def _lost_output(what: str) -> int:
    """Says what has become of standard output; returns the exit code."""
    # what is left in the buffer goes nowhere, else the interpreter stumbles over it at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _say_error(f"the output {what}")
    return EXIT_FAILED


def _say_error(message: str) -> None:
    # file names and what is found in files may hold anything, and may forge no line
    print(f"error: {printable(masked(message))}", file=sys.stderr)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Collects the commands.

    Args:
        command: the one that is wanted; where it is one of this package, the others are not looked
            for.

    Returns:
        The parser; each command sets `run`, a function from the arguments to an exit code.
    """
    parser = _Parser(
        prog="megadlcm",
        description="Pretraining of Dynamic Large Concept Models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megadlcm {__version__}")
    commands: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # all of them whatever the word is: adding a parser is cheap, what runs is imported later
    for module in _COMMANDS.values():
        module.add_parser(commands)
    if command not in _COMMANDS:
        for entry in _commands_above():
            entry.load().add_parser(commands)
    return parser


def _commands_above() -> Iterable[EntryPoint]:
    """Commands that no file here imports, so that imports go one way: `launchers` has them."""
    from importlib.metadata import entry_points

    return entry_points(group=_COMMANDS_ABOVE)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses; argparse alone loses the overrides that stand behind an option."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser(next((word for word in words if not word.startswith("-")), None))
    arguments, rest = parser.parse_known_args(words)
    # argparse takes positionals in one run: overrides behind an option are left over
    takes_overrides = hasattr(arguments, "overrides")
    strange = [text for text in rest if text.startswith("-") or not takes_overrides]
    if strange:
        parser.error(f"unknown argument {strange[0]}")
    if takes_overrides:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments
