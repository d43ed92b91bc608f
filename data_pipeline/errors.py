"""What can be wrong: the user's input, the bytes of the corpus, or the storage they lie on."""

from __future__ import annotations

from data_pipeline.masking import masked


class InputError(ValueError):
    """Says in one line which key has which value, the rule it breaks, and the way out.

    The command line prints `error: <message>` and exits with 2; it shows no traceback.

    Args:
        message: the line.
        key: what the user would change: a dotted key of the config, or an option such as
            `--workers`; empty where it is neither.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(masked(message))
        self.key = key


class DamagedDataError(InputError):
    """Stored bytes are missing or not those written: whoever reads them finds the same.

    `data.on_damage: skip` leaves such bytes out of training and records it; nothing else does.
    """


class StorageError(RuntimeError):
    """The storage did not answer, or a disk did not take what was written; says so in one line.

    Not a statement on the bytes: another process, or the next start, may read them. Never skipped.
    The command line prints `error: <message>` and exits with 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))
