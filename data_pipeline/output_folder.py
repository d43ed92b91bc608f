"""Makes the folder that a command is to write to, or says in one line why that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.errors import InputError


def make_output_folder(folder: Path, key: str) -> None:
    """Makes a folder where there is none; safe to call from several processes.

    Args:
        folder: the folder.
        key: what the user gave it with, for the message.

    Raises:
        InputError: it is no folder that this process may write to.
    """
    reason = "Permission denied"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise InputError(
        f"{key} {folder}: must be a folder that can be written to ({reason}); choose another one"
    )
