"""Variable-length attention over packed documents: one signature, several back-ends.

`reference` runs anywhere and document by document, so nothing is padded. `flash_attn` needs the
package of that name, `varlen` torch's own kernel; both need a recent GPU and a half-precision type.

Letters: T query rows, U key rows, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout, count_bias, replicate

BACKENDS = ("reference", "flash_attn", "varlen")
_HALF_TYPES = (torch.float16, torch.bfloat16)
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_SIZE = 256


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_sizes: Iterable[int]
) -> str:
    """Resolves `auto` to the fastest back-end that can run here.

    Args:
        name: `auto` or one of `BACKENDS`.
        device: where the model runs.
        dtype: type of the queries, keys and values.
        head_sizes: head size of each stack of the model.

    Returns:
        One of `BACKENDS`.

    Raises:
        ValueError: a back-end that was named cannot run here.
    """
    if name == "reference":
        return name
    missing = _missing_for_kernels(device, dtype, head_sizes)
    installed = {"flash_attn": _has_flash_attn(), "varlen": _has_varlen()}
    if name == "auto":
        fast = [backend for backend in installed if installed[backend] and not missing]
        return fast[0] if fast else "reference"
    missing = missing or ("" if installed[name] else "its package, which is not installed")
    if missing:
        raise ValueError(
            f"model.attention_backend={name} needs {missing}: choose auto or reference"
        )
    return name


def _missing_for_kernels(
    device: torch.device, dtype: torch.dtype, head_sizes: Iterable[int]
) -> str:
    """The first thing that every kernel needs and does not find here; empty if there is none."""
    if device.type != "cuda":
        return f"CUDA (device {device.type})"
    if dtype not in _HALF_TYPES:
        return f"CUDA and a half-precision type (got {str(dtype).removeprefix('torch.')})"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return "CUDA of compute capability 8.0 (this GPU has {}.{})".format(*capability)
    unfit = sorted({size for size in head_sizes if size % 8 or size > _MAX_HEAD_SIZE})
    if unfit:
        listed = " and ".join(map(str, unfit))
        return f"head sizes that are multiples of 8 up to {_MAX_HEAD_SIZE} (got {listed})"
    return ""


def self_attention(
    query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, packing: Packing, backend: str
) -> Tensor:
    """Causal attention of each document's rows to the same document's earlier rows.

    softmax(Q K^T / sqrt(H)) V; each key-value head serves N / K query heads.

    Args:
        query_TNH: queries.
        key_TKH: keys.
        value_TKH: values.
        packing: the documents.
        backend: one of `BACKENDS`.

    Returns:
        (T, N, H).
    """
    if backend != "reference":
        kernel = _flash_attention if backend == "flash_attn" else _varlen_attention
        return kernel(query_TNH, key_TKH, value_TKH, packing)
    if packing.num_documents == 1:
        return _document_attention(query_TNH, key_TKH, value_TKH, None)
    runs = list(_equal_length_runs(packing))
    sizes = [length * count for length, count in runs]
    # one split, not a slice for each document: the gradient of a slice fills all T rows
    parts = zip(query_TNH.split(sizes), key_TKH.split(sizes), value_TKH.split(sizes), strict=True)
    outputs = [
        _document_attention(query, key, value, None, count)
        for (query, key, value), (_, count) in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs)


def concept_attention(
    query_TNH: Tensor,
    key_MKH: Tensor,
    value_MKH: Tensor,
    packing: Packing,
    layout: ConceptLayout,
    weighting: str,
    backend: str,
) -> Tensor:
    """Causal attention of tokens to the concepts that are complete when the token is read.

    softmax(Q K^T / sqrt(H) + mask) V (Eq. 14), where the mask also holds log n_k(t) for
    `count` (see `count_bias`). The kernels run `count` over replicated concepts (Eq. 17), which
    is the same function; no kernel expresses `uniform`, so that weighting uses the reference.

    Args:
        query_TNH: queries of the tokens.
        key_MKH: keys of the concepts.
        value_MKH: values of the concepts.
        packing: the documents.
        layout: the concepts.
        weighting: `count` or `uniform`.
        backend: one of `BACKENDS`.

    Returns:
        (T, N, H).
    """
    if backend != "reference" and weighting == "count":
        key_TKH, value_TKH = replicate(key_MKH, layout), replicate(value_MKH, layout)
        return self_attention(query_TNH, key_TKH, value_TKH, packing, backend)
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
            outputs.append(_document_attention(query, key, value, bias.to(query.dtype)))
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
    with torch.autocast(query.device.type, enabled=False):
        output = _document_attention(query, key, value, bias.to(wide))
    return output.to(query_TNH.dtype)


def _equal_length_runs(packing: Packing) -> Iterator[tuple[int, int]]:
    """Length and number of neighbouring documents of equal length: windows of a text are many."""
    for length, members in itertools.groupby(packing.lengths):
        yield length, sum(1 for _ in members)


def _document_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, count: int = 1
) -> Tensor:
    """Attention inside `count` documents of equal length laid end to end."""
    grouped = query.shape[1] != key.shape[1]
    batched = [
        part.view(count, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value)
    ]
    output = F.scaled_dot_product_attention(
        batched[0],
        batched[1],
        batched[2],
        attn_mask=bias,
        is_causal=bias is None,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2).reshape(query.shape)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    return flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = _varlen_options()
    if query.shape[1] != key.shape[1] and "enable_gqa" not in options:
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(output, Tensor), "only return_aux adds a second result"
    return output


@functools.cache
def _varlen_options() -> dict[str, Any]:
    """Says causal, grouped attention in the words of the installed torch (they changed)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    return options | ({"enable_gqa": True} if "enable_gqa" in known else {})


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None
