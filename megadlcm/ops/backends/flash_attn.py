"""The kernels of the package flash-attn."""

from __future__ import annotations

from torch import Tensor

from megadlcm.ops.backends.replicated import attend_replicated
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout


def attend_documents(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """See `ops.attention.self_attention`."""
    # not at the top: the file is read on machines that cannot install the package
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    return flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )


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
