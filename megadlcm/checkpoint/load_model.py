"""The model of a run on one device, whatever layout wrote its checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megadlcm.checkpoint.tensors import read_tensors
from megadlcm.config import config_from_dict
from megadlcm.model import LanguageModel, build_model
from megadlcm.run_folder import files
from megadlcm.run_folder.checkpoints import find_checkpoint, read_description


def load_model(path: str | Path) -> LanguageModel:
    """Loads the model of a run in fp32 on the CPU, whatever layout wrote it.

    Args:
        path: a run folder, or a checkpoint folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: no complete checkpoint there.
    """
    folder = find_checkpoint(path)
    config = config_from_dict(read_description(folder)["config"])
    # the run may have named a kernel that no CPU has
    shape = dataclasses.replace(config.model, attention_backend="auto")
    # on meta first: initial values would be drawn for nothing
    model = build_model(shape, config.mup, device=torch.device("meta"))
    model = model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(read_tensors(folder / files.MODEL), strict=True)
    assert not missing and not unexpected
    return model.eval()
