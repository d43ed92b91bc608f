"""The model of a run on one device, whatever layout wrote its checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from data_pipeline.errors import InputError
from megadlcm.checkpoint.folder import find_checkpoint
from megadlcm.checkpoint.format import MASTER
from megadlcm.checkpoint.index import Range
from megadlcm.checkpoint.reading import BlockReader, jobs_for
from megadlcm.config import config_from_dict
from megadlcm.model import LanguageModel, build_model


def load_model(path: str | Path) -> LanguageModel:
    """Loads the model of a run in fp32 on the CPU, whatever layout wrote it.

    Args:
        path: a run folder, or a checkpoint folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: no complete checkpoint there.
    """
    checkpoint = find_checkpoint(path)
    config = config_from_dict(checkpoint.description["config"])
    # the run may have named a kernel that no CPU has
    shape = dataclasses.replace(config.model, attention_backend="auto")
    # on meta first: initial values would be drawn for nothing
    model = build_model(shape, config.mup, device=torch.device("meta"))
    model = model.to_empty(device="cpu")
    jobs = []
    for name, tensor in model.state_dict().items():
        part = Range.whole(name, tuple(tensor.shape))
        jobs += jobs_for(checkpoint, part, MASTER, tensor.view(-1).numpy())
    try:
        BlockReader(checkpoint.storage, checkpoint.name, checkpoint.manifest.files).run(jobs)
    except InputError as error:
        raise InputError(f"checkpoint {checkpoint.name}: {error}; name another one") from error
    return model.eval()
