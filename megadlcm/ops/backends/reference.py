"""Attention that runs anywhere, document by document, so that nothing is padded.

Letters: T query rows, M concepts, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout, count_bias


def attend_documents(
    query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, packing: Packing
) -> Tensor:
    """See `ops.attention.self_attention`."""
    if packing.num_documents == 1:
        return masked_attention(query_TNH, key_TKH, value_TKH, None)
    runs = list(_equal_length_runs(packing))
    sizes = [length * count for length, count in runs]
    # one split, not a slice for each document: the gradient of a slice fills all T rows
    parts = zip(query_TNH.split(sizes), key_TKH.split(sizes), value_TKH.split(sizes), strict=True)
    outputs = [
        masked_attention(query, key, value, None, count)
        for (query, key, value), (_, count) in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs)


def attend_concepts(
    query_TNH: Tensor,
    key_MKH: Tensor,
    value_MKH: Tensor,
    packing: Packing,
    layout: ConceptLayout,
    weighting: str,
) -> Tensor:
    """See `ops.attention.concept_attention`."""
    tokens, concepts = packing.lengths, layout.packing.lengths
    parts = zip(
        query_TNH.split(tokens),
        key_MKH.split(concepts),
        value_MKH.split(concepts),
        layout.visible_concept_T.split(tokens),
        layout.run_length_M.split(concepts),
        layout.packing.bounds,
        strict=False,  # the bounds end with the total
    )
    outputs = []
    for query, key, value, visible_T, run_M, first in parts:
        bias = count_bias(visible_T - first, run_M, weighting)
        if weighting == "count":
            outputs.append(biased_attention(query, key, value, bias))
        else:  # 0 and -inf are exact in any type
            outputs.append(masked_attention(query, key, value, bias.to(query.dtype)))
    return torch.cat(outputs)


def biased_attention(query_TNH: Tensor, key_MKH: Tensor, value_MKH: Tensor, bias: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(H) + bias) V of one document, in fp32 or wider.

    bf16 would round the log of a count so that a concept's weight is off by up to two per cent.

    Args:
        query_TNH: queries of tokens.
        key_MKH: keys of the concepts.
        value_MKH: values of the concepts.
        bias: (T, M).

    Returns:
        (T, N, H) in the dtype of the queries.
    """
    wide = torch.promote_types(query_TNH.dtype, torch.float32)
    query, key, value = (part.to(wide) for part in (query_TNH, key_MKH, value_MKH))
    # autocast would take them back to bf16, the bias included
    with torch.autocast(query.device.type, enabled=False):
        output = masked_attention(query, key, value, bias.to(wide))
    return output.to(query_TNH.dtype)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    count: int = 1,
    causal: bool = True,
) -> Tensor:
    """Attention inside `count` documents of equal length laid end to end.

    Args:
        query: (rows, N, H).
        key: (rows or concepts, K, H).
        value: as the keys.
        bias: added to the scores; it then also says who sees what.
        count: documents.
        causal: without a bias: whether row t sees rows up to t only.

    Returns:
        (rows, N, H).
    """
    grouped = query.shape[1] != key.shape[1]
    batched = [
        part.view(count, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value)
    ]
    output = F.scaled_dot_product_attention(
        batched[0],
        batched[1],
        batched[2],
        attn_mask=bias,
        is_causal=causal and bias is None,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).reshape(query.shape)


def _equal_length_runs(packing: Packing) -> Iterator[tuple[int, int]]:
    """Length and number of neighbouring documents of equal length: windows of a text are many."""
    for length, members in itertools.groupby(packing.lengths):
        yield length, sum(1 for _ in members)
