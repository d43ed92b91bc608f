"""How operations are carried out, as far as planning must know it without torch. Stdlib only.

An attention back-end is a row here and a file of its name in `ops/backends/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionBackend = Literal["auto", "reference", "flash_attn", "varlen"]

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BackendTraits:
    """What a back-end needs, and what recomputation keeps of it."""

    package: str = ""
    """Module that has to be installed."""

    device: str = ""
    """Type of the device; empty for any."""

    capability: tuple[int, int] = (0, 0)
    """Oldest compute capability."""

    dtypes: tuple[str, ...] = ()
    """Types of queries, keys and values; empty for any."""

    head_multiple: int = 1
    """What head sizes must be a multiple of."""

    max_head_size: int | None = None
    """Largest head size; None for any."""

    attends_packed: bool = True
    """Whether one call serves all packed documents, instead of one after the other."""

    kept_operators: tuple[str, ...] = ()
    """Beginnings of the names under which torch knows its kernels: `selective` keeps their outputs.
    A kernel that is missing here is run a second time, and nothing but the time shows it."""


# the fastest first: `auto` takes the first one that can run
ATTENTION_BACKENDS: dict[AttentionBackend, BackendTraits] = {
    "flash_attn": BackendTraits(
        package="flash_attn",
        device="cuda",
        capability=(8, 0),
        dtypes=_HALF,
        head_multiple=8,
        max_head_size=256,
        kept_operators=("flash_attn.", "flash_attn_3."),
    ),
    "varlen": BackendTraits(
        package="torch.nn.attention.varlen",
        device="cuda",
        capability=(8, 0),
        dtypes=_HALF,
        head_multiple=8,
        max_head_size=256,
        kept_operators=("torch_attn.",),
    ),
    "reference": BackendTraits(
        attends_packed=False,
        # torch's own choice among them depends on device, type and mask
        kept_operators=(
            "aten._scaled_dot_product",
            "aten._flash_attention",
            "aten._efficient_attention",
        ),
    ),
}


def backend_candidates(name: AttentionBackend) -> dict[AttentionBackend, BackendTraits]:
    """The back-ends that a value of `model.attention_backend` may stand for, fastest first."""
    return ATTENTION_BACKENDS if name == "auto" else {name: ATTENTION_BACKENDS[name]}
