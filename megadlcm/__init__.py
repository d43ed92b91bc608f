"""megadlcm: pretraining of Dynamic Large Concept Models."""

from __future__ import annotations

__version__ = "0.1.0"
