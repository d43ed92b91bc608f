"""The models: DLCM and its dense control, on one device, without a process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megadlcm.config import ModelConfig, MupConfig, model_config_from_dict
from megadlcm.model.dense import Dense
from megadlcm.model.dlcm import DLCM
from megadlcm.model.language_model import LanguageModel
from megadlcm.model.scaling import initialize_parameters, width_multiplier_token

__all__ = ["DLCM", "Dense", "LanguageModel", "build_model"]


def build_model(
    config: ModelConfig | Mapping[str, Any],
    mup: MupConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Builds a model in fp32, initialised by the muP table.

    Args:
        config: shape of the model, or the same as a mapping.
        mup: base width and base standard deviation; None takes their defaults.
        seed: seed of the initial values.
        device: where to build; on `meta` nothing is allocated or initialised.

    Returns:
        The model, in training mode.

    Raises:
        InputError: the config is not valid.
    """
    if not isinstance(config, ModelConfig):
        config = model_config_from_dict(config)
    mup = mup or MupConfig()
    model_class = {"dlcm": DLCM, "dense": Dense}[config.architecture]
    device = torch.device(device) if device is not None else torch.get_default_device()
    # on its device from the start: a large model does not fit where it need not be
    with torch.device(device):
        model = model_class(config, output_scale=1.0 / width_multiplier_token(config, mup))
    if device.type != "meta":
        initialize_parameters(model, config, mup, seed)
    return model
