"""What the server of `distributed` imports before it forks; none of it starts a thread."""

from __future__ import annotations

import gc

from megadlcm.engine.engine import import_deepspeed

import_deepspeed()
# a collection in a forked process would copy every page of what was imported
gc.collect()
gc.freeze()
