"""The one error that means: what the user gave is wrong, not the program."""

from __future__ import annotations


class InputError(ValueError):
    """Says in one line which key has which value, the rule it breaks, and the way out.

    The command line prints `error: <message>` and exits with 2; it shows no traceback.
    """
