"""Lets `python -m megadlcm` do what `megadlcm` does."""

from __future__ import annotations

import sys

from megadlcm.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
