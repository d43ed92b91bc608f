"""The log of a process, in its own file of the run folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.masking import masked
from data_pipeline.output_folder import disk_error, writing
from data_pipeline.tables import printable
from megadlcm.config import RunConfig
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.run_folder import files

_LOGGERS = ("megadlcm", "data_pipeline")


class _LineFormatter(logging.Formatter):
    """Writes a message as one line: names that come from data may forge no other."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns all that the log gets of a record; what a library raised may name a password."""
        return masked(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line; the traceback below it is not a part of it."""
        return printable(super().formatMessage(record))


@contextlib.contextmanager
def rank_log(config: RunConfig, mesh: ParallelMesh) -> Iterator[None]:
    """Sends what this process logs to its file for as long as the context is open.

    Args:
        config: the run.
        mesh: ranks of the run.
    """
    path = Path(config.output_dir) / files.LOGS / files.rank_log(mesh.rank)
    handler = _open(path)
    handler.setFormatter(
        _LineFormatter(f"%(asctime)s rank {mesh.rank} %(levelname)s %(name)s: %(message)s")
    )
    # ours only: the root logger would bring what libraries say, on every rank
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """Ends the run where a line cannot be written, once: the last words are still said."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Raises what the disk said; logging itself prints a traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            raise disk_error(Path(self.baseFilename), error.strerror or str(error)) from error

    def close(self) -> None:
        """Closes the file, without the lines that it did not take."""
        with contextlib.suppress(OSError):
            super().close()


def _open(path: Path) -> _LogFile:
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"output_dir = {path}: must be a file that can be written to ({error.strerror}); "
            "remove it, or choose another output_dir",
            key="output_dir",
        ) from error
