"""The kernel for packed sequences that comes with torch."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from megadlcm.ops.backends.replicated import attend_replicated
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout


def attend_documents(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """See `ops.attention.self_attention`."""
    # not at the top: older versions of torch have no such module
    from torch.nn.attention.varlen import varlen_attn

    options = _options()
    if query.shape[1] != key.shape[1] and "enable_gqa" not in options:
        # an older kernel takes as many key heads as query heads
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(output, Tensor), "only return_aux adds a second result"
    return output


def attend_concepts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    layout: ConceptLayout,
    weighting: str,
) -> Tensor:
    """See `ops.attention.concept_attention`."""
    return attend_replicated(attend_documents, query, key, value, packing, layout, weighting)


@functools.cache
def _options() -> dict[str, Any]:
    """Says causal, grouped attention in the words of the installed torch (they changed)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})
