"""The run folder at the start of a run: what must be writable in it, and the resolved config."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.output_folder import make_output_folder, write_durably, writing
from megadlcm.config import RunConfig
from megadlcm.config.decode import dump_config
from megadlcm.run_folder import files

_FOLDERS = (files.CHECKPOINTS, files.LOGS, files.SAMPLES, files.SKIPPED, files.TENSORBOARD)
_APPENDED = (files.METRICS, files.ABANDONED, files.EVENTS)
_WAY_OUT = "remove it, or choose another output_dir"


def check_run_folder(folder: Path) -> None:
    """Tries whether a run could write all that it is going to, and makes nothing.

    Args:
        folder: the run folder, which can be written to.

    Raises:
        InputError: something stands in the way, which would be found after hours of training.
    """
    for name in _FOLDERS:
        if os.path.lexists(folder / name):  # else it can be made
            make_output_folder(folder / name, "output_dir =", _WAY_OUT)
    for name in (*_APPENDED, files.CONFIG):
        path, reason = folder / name, "it is none"
        # a pipe would be waited for, and a device be read without an end
        if path.is_file() or not os.path.lexists(path):
            if name == files.CONFIG:
                continue  # replaced, whatever may be written to it
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
                continue
            except FileNotFoundError:
                continue
            except OSError as error:
                reason = error.strerror or str(error)
        raise InputError(
            f"output_dir = {path}: must be a file that can be written to ({reason}); {_WAY_OUT}",
            key="output_dir",
        )


def prepare_run_folder(config: RunConfig) -> None:
    """Writes config.yaml.

    Args:
        config: the resolved run.
    """
    folder = Path(config.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / files.CONFIG, dump_config(config).encode())


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is what a run leaves behind, and nothing else that one would miss."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    # a run that ends early has nothing but logs, and one that is killed then its owner
    return names <= {files.LOGS, files.OWNER} or not names.isdisjoint({files.CONFIG, files.METRICS})
