"""Tensors as safetensors files; what the disk says of them bears its number and the file's name."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.output_folder import reading


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file, on the CPU.

    Raises:
        StorageError: the disk fails.
    """
    with reading(path), _numbered_errors(path):
        return load_file(path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors as a file for whom the umask allows; raises OSError where the disk fails."""
    # safetensors replaces it by a temporary file, which nobody else may read
    path.touch()
    mode = path.stat().st_mode
    with _numbered_errors(path):
        save_file(tensors, path)
    path.chmod(mode)


@contextlib.contextmanager
def _numbered_errors(path: Path) -> Iterator[None]:
    """Makes errors of the system, which safetensors has in words alone, those of Python."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
