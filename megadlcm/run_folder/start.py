"""The run folder at the start of a run: resolved config, and no metrics of another run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.output_folder import write_durably
from megadlcm.config import RunConfig, config_to_dict, load_config
from megadlcm.config.decode import dump_config
from megadlcm.run_folder import files

logger = logging.getLogger(__name__)

# what may differ between two starts whose metrics belong to one curve
_FREE_SECTIONS = ("name", "output_dir", "checkpoint", "evaluation", "logging")


def prepare_run_folder(config: RunConfig, resumed: bool) -> None:
    """Writes config.yaml; sets metrics aside that another config left without a checkpoint.

    A run that was killed before its first checkpoint starts again from scratch and replays its
    rows. If its config was changed in between, those rows would be another run's.

    Args:
        config: the resolved run.
        resumed: whether a checkpoint is continued, which has checked the config already.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / files.METRICS
    if not resumed and metrics.exists() and _curve_of(config) != _saved_curve(folder):
        # set aside, not removed: whoever changed the config may want the curve
        number = 1
        while (aside := folder / f"{files.METRICS}.{number}").exists():
            number += 1
        metrics.replace(aside)
        logger.warning("the config changed and there is no checkpoint: moved metrics to %s", aside)
    write_durably(folder / files.CONFIG, dump_config(config).encode())


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is what a run leaves behind, and nothing else that one would miss."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    # a run that ends early has nothing but logs
    return names <= {files.LOGS} or not names.isdisjoint({files.CONFIG, files.METRICS})


def _curve_of(config: RunConfig) -> dict[str, Any]:
    values = config_to_dict(config)
    return {key: value for key, value in values.items() if key not in _FREE_SECTIONS}


def _saved_curve(folder: Path) -> dict[str, Any] | None:
    try:
        return _curve_of(load_config(folder / files.CONFIG))
    except (InputError, OSError):
        return None
