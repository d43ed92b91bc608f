"""Text to shards to packed batches; imports nothing of megadlcm.

The public names load on first use: a login node that only reads a config needs no numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.reading.samples import open_samples
    from data_pipeline.shard_format.index import read_index

__all__ = ["open_samples", "read_index"]

_HOMES = {
    "open_samples": "data_pipeline.reading.samples",
    "read_index": "data_pipeline.shard_format.index",
}


def __getattr__(name: str) -> Any:
    """Returns a public name from the file it lives in; raises AttributeError for any other."""
    if name not in _HOMES:
        raise AttributeError(f"module 'data_pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
