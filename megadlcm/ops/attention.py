"""Variable-length attention over packed documents: one signature, several back-ends.

What a back-end needs is its row in `config.kernels`; what it does is its file in `ops/backends`.

Letters: T query rows, U key rows, M concepts, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from megadlcm.config.kernels import AttentionBackend, BackendTraits, backend_candidates
from megadlcm.ops.backends.reference import biased_attention, masked_attention
from megadlcm.ops.packing import Packing
from megadlcm.ops.segments import ConceptLayout


class Backend(Protocol):
    """A file of `ops/backends`; its functions take no back-end, and else what those below take."""

    def attend_documents(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, /
    ) -> Tensor:
        """See `self_attention`."""
        ...

    def attend_concepts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        layout: ConceptLayout,
        weighting: str,
        /,
    ) -> Tensor:
        """See `concept_attention`."""
        ...


@functools.cache
def backend_module(name: str) -> Backend:
    """The file of a back-end, read when it is first used."""
    return cast(Backend, importlib.import_module(f"megadlcm.ops.backends.{name}"))


def choose_backend(
    name: AttentionBackend, device: torch.device, dtype: torch.dtype, head_sizes: Iterable[int]
) -> AttentionBackend:
    """Resolves `auto` to the fastest back-end that can run here.

    Args:
        name: `auto` or one of `ATTENTION_BACKENDS`.
        device: where the model runs.
        dtype: type of the queries, keys and values.
        head_sizes: head size of each stack of the model.

    Returns:
        One of `ATTENTION_BACKENDS`.

    Raises:
        ValueError: a back-end that was named cannot run here.
    """
    # read once for each candidate
    head_sizes, missing = list(head_sizes), ""
    for candidate, needs in backend_candidates(name).items():
        missing = _missing(needs, device, dtype, head_sizes)
        if not missing:
            return candidate
    raise ValueError(f"model.attention_backend={name} needs {missing}: choose auto or reference")


def _missing(
    needs: BackendTraits, device: torch.device, dtype: torch.dtype, head_sizes: Sequence[int]
) -> str:
    """The first thing that a back-end needs and does not find here; empty if there is none."""
    # in this order: only a GPU has a capability, and a package says nothing where it cannot run
    where = needs.device.upper()
    if needs.device not in ("", device.type):
        return f"{where} (device {device.type})"
    own_dtype = str(dtype).removeprefix("torch.")
    if needs.dtypes and own_dtype not in needs.dtypes:
        halves = set(needs.dtypes) <= {"float16", "bfloat16"}
        kind = "a half-precision type" if halves else " or ".join(needs.dtypes)
        return f"{where} and {kind} (got {own_dtype})"
    if needs.capability > (0, 0):
        # asks the driver: only where a row wants one, because a CPU has none
        found = torch.cuda.get_device_capability(device)
        if found < needs.capability:
            wanted = "{}.{}".format(*needs.capability)
            return f"{where} of compute capability {wanted} (this GPU has {found[0]}.{found[1]})"
    largest = needs.max_head_size or max(head_sizes)
    unfit = sorted({size for size in head_sizes if size % needs.head_multiple or size > largest})
    if unfit:
        listed = " and ".join(map(str, unfit))
        return (
            f"head sizes that are multiples of {needs.head_multiple} up to {largest} (got {listed})"
        )
    return "" if is_installed(needs.package) else "its package, which is not installed"


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module can be found; nothing always can."""
    if not module:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


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
        backend: one of `ATTENTION_BACKENDS`.

    Returns:
        (T, N, H).
    """
    return backend_module(backend).attend_documents(query_TNH, key_TKH, value_TKH, packing)


def self_attention_step(query_1NH: Tensor, key_UKH: Tensor, value_UKH: Tensor) -> Tensor:
    """The same for the newest row of one document, which is the last of the keys; (1, N, H)."""
    return masked_attention(query_1NH, key_UKH, value_UKH, None, causal=False)


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
        backend: one of `ATTENTION_BACKENDS`.

    Returns:
        (T, N, H).
    """
    attend = backend_module(backend).attend_concepts
    return attend(query_TNH, key_MKH, value_MKH, packing, layout, weighting)


def concept_attention_step(
    query_1NH: Tensor,
    key_MKH: Tensor,
    value_MKH: Tensor,
    run_lengths: Sequence[int],
    weighting: str,
) -> Tensor:
    """The same for the newest token of one document, which sees every concept so far.

    Args:
        query_1NH: its query.
        key_MKH: keys of the concepts.
        value_MKH: values of the concepts.
        run_lengths: tokens up to this one that have each concept as their newest, n_k(t).
        weighting: `count` or `uniform`.

    Returns:
        (1, N, H).
    """
    if weighting == "uniform":
        return self_attention_step(query_1NH, key_MKH, value_MKH)
    counts = torch.tensor(run_lengths, dtype=torch.float64, device=query_1NH.device)
    return biased_attention(query_1NH, key_MKH, value_MKH, counts.log().unsqueeze(0))
