"""The face under which users load a trained model; the code is in `checkpoint`."""

from __future__ import annotations

from megadlcm.checkpoint.load_model import load_model

__all__ = ["load_model"]
