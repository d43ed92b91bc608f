"""The run folder at the start of a run: resolved config, and no metrics of another run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig, config_to_dict, load_config
from megadlcm.config.decode import dump_config
from megadlcm.training.checkpoint_folder import replace_text
from megadlcm.training.metrics import METRICS_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
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
    metrics = folder / METRICS_FILE
    if not resumed and metrics.exists() and _curve_of(config) != _saved_curve(folder):
        number = 1
        while (aside := folder / f"{METRICS_FILE}.{number}").exists():
            number += 1
        metrics.replace(aside)
        logger.warning("the config changed and there is no checkpoint: moved metrics to %s", aside)
    replace_text(folder / CONFIG_FILE, dump_config(config))


def _curve_of(config: RunConfig) -> dict[str, Any]:
    values = config_to_dict(config)
    return {key: value for key, value in values.items() if key not in _FREE_SECTIONS}


def _saved_curve(folder: Path) -> dict[str, Any] | None:
    try:
        return _curve_of(load_config(folder / CONFIG_FILE))
    except (InputError, OSError):
        return None
