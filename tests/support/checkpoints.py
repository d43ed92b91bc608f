"""What a checkpoint folder holds, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megadlcm.run_folder import files
from megadlcm.run_folder.checkpoints import read_description


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Model tensors, optimizer tensors and `state.json` of a checkpoint folder."""
    return load_file(path / files.MODEL), load_file(path / files.OPTIMIZER), read_description(path)
