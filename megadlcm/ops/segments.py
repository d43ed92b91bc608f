"""From boundary decisions to concepts: which token pools into which, and who sees what.

With phi(k) the k-th boundary of a document (0-based, phi(0) = 0):

| align         | tokens pooled into concept k          | token t sees concepts       |
|---------------|---------------------------------------|-----------------------------|
| `end`         | (phi(k-1), phi(k)]                    | 0 .. (boundaries up to t)-1 |
| `start_shift` | [phi(k-1), phi(k)); concept 0 is null | the same                    |

Both are causal: concept k is complete when its boundary is read, at phi(k), and no token before
phi(k) sees it. The paper's literal reading (pool [phi(k), phi(k+1)), see it from phi(k)) is not.
Tokens after the last boundary of a document form an open segment that no concept holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadlcm.ops.packing import Packing, packing_from_offsets


@dataclass(frozen=True)
class ConceptLayout:
    """Integer description of the concepts of one packed batch; M concepts, T tokens."""

    packing: Packing
    """The concepts of each document, packed in the same order as the documents."""
    visible_concept_T: Tensor
    """Newest concept that each token sees, int64 (T,)."""
    pooled_concept_T: Tensor
    """Concept that each token pools into, int64 (T,); -1 for tokens of an open segment."""
    pooled_count_M: Tensor
    """Tokens pooled into each concept, int64 (M,); 0 for the null concept."""
    boundary_position_M: Tensor
    """Row of the boundary from which each concept is visible, int64 (M,)."""
    run_length_M: Tensor
    """Tokens whose newest concept is this one, int64 (M,)."""

    @property
    def num_concepts(self) -> int:
        """Concepts of the packed batch, M."""
        return self.packing.num_rows


def concept_layout(mask_T: Tensor, packing: Packing, align: str) -> ConceptLayout:
    """Turns boundary decisions into the layout of the concepts.

    Args:
        mask_T: boundaries, bool (T,), true at each document start.
        packing: the documents.
        align: `end` or `start_shift`, see the table above.

    Returns:
        The layout; asks the device once, for the number of concepts of each document.
    """
    seen_T = mask_T.long().cumsum(0)
    visible_T = seen_T - 1
    ends = packing.cu_seqlens[1:].long() - 1
    cu_concepts = torch.nn.functional.pad(seen_T[ends], (1, 0)).to(torch.int32)
    num_concepts = int(cu_concepts[-1])
    concepts = packing_from_offsets(cu_concepts, num_concepts)
    pooled_T = visible_T + 1 - mask_T.long() if align == "end" else visible_T + 1
    # an open segment's running index is the next document's first concept: it must not pool there
    limit_T = (
        concepts.cu_seqlens[1:]
        .long()
        .repeat_interleave(packing.cu_seqlens.diff().long(), output_size=packing.num_rows)
    )
    pooled_T = torch.where(pooled_T < limit_T, pooled_T, torch.full_like(pooled_T, -1))
    count_M = torch.bincount(pooled_T + 1, minlength=num_concepts + 1)[1:]
    boundary_M = torch.nonzero_static(mask_T, size=num_concepts).squeeze(-1)
    run_length_M = torch.bincount(visible_T, minlength=num_concepts)
    return ConceptLayout(concepts, visible_T, pooled_T, count_M, boundary_M, run_length_M)


def segment_mean(hidden_TD: Tensor, layout: ConceptLayout) -> Tensor:
    """Means of the tokens of each segment (Eq. 7), accumulated in fp32 or wider.

    Sums by `index_add`: differences of running sums lose all precision on long batches.

    Args:
        hidden_TD: token states (T, D).
        layout: the concepts.

    Returns:
        (M, D) in the dtype of `hidden_TD`; zeros for the null concept.
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    # row 0 collects the tokens of open segments and is dropped, which avoids a ragged selection
    sums = torch.zeros(
        layout.num_concepts + 1, hidden_TD.shape[-1], dtype=wide, device=hidden_TD.device
    ).index_add(0, layout.pooled_concept_T + 1, hidden_TD.to(wide))
    mean_MD = sums[1:] / layout.pooled_count_M.clamp(min=1).unsqueeze(-1)
    return mean_MD.to(hidden_TD.dtype)


def replicate(concept_M: Tensor, layout: ConceptLayout) -> Tensor:
    """Repeats each concept over the tokens that see it as their newest one (Eq. 17).

    Args:
        concept_M: values of the concepts (M, ...).
        layout: the concepts.

    Returns:
        (T, ...).
    """
    return concept_M.index_select(0, layout.visible_concept_T)


def count_bias(visible_T: Tensor, first: int, num_concepts: int, weighting: str) -> Tensor:
    """Additive attention mask of one document's tokens against its concepts.

    `count`: log n_k(t), where n_k(t) is how many tokens up to t have concept k as their newest;
    attention with it equals attention over replicated concepts under a causal mask. `uniform`:
    0, which is Eq. 14. Concepts that t does not see get -inf.

    Args:
        visible_T: newest visible concept of each token, int64 (tokens of the document,).
        first: index of the document's first concept.
        num_concepts: concepts of the document.
        weighting: `count` or `uniform`.

    Returns:
        fp64 (tokens, concepts).
    """
    newest_T1 = (visible_T - first).unsqueeze(1)
    concept_M = torch.arange(num_concepts, device=visible_T.device)
    shape = (visible_T.numel(), num_concepts)
    bias = torch.zeros(shape, dtype=torch.float64, device=visible_T.device)
    if weighting == "count":
        run_M = torch.bincount(newest_T1.squeeze(1), minlength=num_concepts)
        start_M = run_M.cumsum(0) - run_M
        token_T1 = torch.arange(visible_T.numel(), device=visible_T.device).unsqueeze(1)
        bias = torch.minimum(token_T1 - start_M + 1, run_M).clamp(min=1).double().log()
    return bias.masked_fill(concept_M > newest_T1, -torch.inf)
