"""Where the tests find the repository and the text beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
DATA = ROOT.parent / "shared" / "data"
"""Real text; tests that need it skip where it is not."""
