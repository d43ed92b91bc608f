"""Tensors that a disk does not give or take are told in the words of Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import StorageError
from megadlcm.checkpoint.tensors import read_tensors, write_tensors


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("/proc/self/mem")  # cannot be mapped
    with pytest.raises(StorageError) as failed:
        read_tensors(path)
    assert str(failed.value).startswith(f"{path}: cannot be read (No such device); look after")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors({"a": torch.arange(3)}, path)
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none")
