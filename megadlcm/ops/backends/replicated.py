"""Concepts for kernels that know documents only: each is repeated over the tokens that see it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megadlcm.ops.backends import reference
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout, replicate


def attend_replicated(
    attend_documents: Callable[[Tensor, Tensor, Tensor, Packing], Tensor],
    query_TNH: Tensor,
    key_MKH: Tensor,
    value_MKH: Tensor,
    packing: Packing,
    layout: ConceptLayout,
    weighting: str,
) -> Tensor:
    """Attention from tokens to concepts by a kernel for documents (Eq. 17).

    Args:
        attend_documents: the kernel.
        query_TNH: queries of the tokens.
        key_MKH: keys of the concepts.
        value_MKH: values of the concepts.
        packing: the documents.
        layout: the concepts.
        weighting: `count` or `uniform`.

    Returns:
        (T, N, H).
    """
    # replication is `count` by its nature: no kernel expresses `uniform`
    if weighting != "count":
        return reference.attend_concepts(query_TNH, key_MKH, value_MKH, packing, layout, weighting)
    key_TKH, value_TKH = replicate(key_MKH, layout), replicate(value_MKH, layout)
    return attend_documents(query_TNH, key_TKH, value_TKH, packing)
