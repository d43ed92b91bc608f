"""The log of a process, in its own file of the run folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from megadlcm.config import RunConfig
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.run_folder import files

_LOGGERS = ("megadlcm", "data_pipeline")


@contextlib.contextmanager
def rank_log(config: RunConfig, mesh: ParallelMesh) -> Iterator[None]:
    """Sends what this process logs to its file for as long as the context is open.

    Args:
        config: the run.
        mesh: ranks of the run.
    """
    folder = Path(config.output_dir) / files.LOGS
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / files.rank_log(mesh.rank), encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s rank {mesh.rank} %(levelname)s %(name)s: %(message)s")
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
