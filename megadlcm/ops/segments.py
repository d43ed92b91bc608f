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
from typing import Any

import torch
import torch.nn.functional as F
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
    pool_stop_M: Tensor
    """Row after the last token pooled into each concept, int64 (M,)."""
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
    closes = align == "end"  # whether a boundary token pools into the segment that it ends
    seen_T = mask_T.long().cumsum(0)
    visible_T = seen_T - 1
    # what was counted by the last token of a document is where its concepts end
    ends = packing.cu_seqlens[1:].long() - 1
    concepts = packing_from_offsets(F.pad(seen_T[ends], (1, 0)).to(torch.int32))
    # a token pools into the concept that comes next, and a closing boundary into its own
    pooled_T = visible_T + 1 - mask_T.long() if closes else visible_T + 1
    # an open segment's running index is the next document's first concept: it must not pool there
    limit_T = (
        concepts.cu_seqlens[1:]
        .long()
        .repeat_interleave(packing.cu_seqlens.diff().long(), output_size=packing.num_rows)
    )
    pooled_T = torch.where(pooled_T < limit_T, pooled_T, torch.full_like(pooled_T, -1))
    # static: the size is known by now, and the device is not asked for it
    boundary_M = torch.nonzero_static(mask_T, size=concepts.num_rows).squeeze(-1)
    count_M = F.pad(boundary_M, (1, 0)).diff()  # a concept pools what lies between two boundaries
    count_M = count_M.masked_fill(concepts.position == 0, 1 if closes else 0)
    stop_M = boundary_M + 1 if closes else boundary_M
    run_length_M = F.pad(boundary_M, (0, 1), value=packing.num_rows).diff()
    return ConceptLayout(concepts, visible_T, pooled_T, count_M, stop_M, boundary_M, run_length_M)


def segment_mean(hidden_TD: Tensor, layout: ConceptLayout) -> Tensor:
    """Means of the tokens of each segment (Eq. 7), accumulated in fp32 or wider.

    Each segment is summed by itself: differences of running sums lose all precision on long
    batches, and scattered additions have no fixed order on a GPU.

    Args:
        hidden_TD: token states (T, D).
        layout: the concepts.

    Returns:
        (M, D) in the dtype of `hidden_TD`; zeros for the null concept.
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    # an open segment lies before the next document's first one and joins its run, as zeros; the
    # run after the last concept is dropped
    held_T1 = (layout.pooled_concept_T >= 0).unsqueeze(1)
    held_TD = torch.where(held_T1, hidden_TD.to(wide), 0.0)
    run_M1 = F.pad(F.pad(layout.pool_stop_M, (1, 0)), (0, 1), value=hidden_TD.shape[0]).diff()
    sums_MD = _SumRuns.apply(held_TD, layout.pooled_concept_T.clamp(min=0), run_M1)[:-1]
    # the null concept holds no token: 0 / 1
    mean_MD = sums_MD / layout.pooled_count_M.clamp(min=1).unsqueeze(-1)
    return mean_MD.to(hidden_TD.dtype)


def replicate(concept_M: Tensor, layout: ConceptLayout) -> Tensor:
    """Repeats each concept over the tokens that see it as their newest one (Eq. 17).

    Args:
        concept_M: values of the concepts (M, ...).
        layout: the concepts.

    Returns:
        (T, ...); gradients are summed over each run in fp32 or wider.
    """
    repeated: Tensor = _RepeatRuns.apply(concept_M, layout.visible_concept_T, layout.run_length_M)
    return repeated


class _RepeatRuns(torch.autograd.Function):
    """Row run_T[t] for each t; its gradient is `_SumRuns`, and the other way round.

    The gradient of `index_select` is a scattered addition: in the type of the gradient, and on a
    GPU in any order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, run_T: Tensor, length_M: Tensor) -> Tensor:
        ctx.save_for_backward(run_T, length_M)
        return rows.index_select(0, run_T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _SumRuns.apply(gradient, *ctx.saved_tensors), None, None


class _SumRuns(torch.autograd.Function):
    """Sums `length_M` neighbouring rows at a time, in their order, in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, run_T: Tensor, length_M: Tensor) -> Tensor:
        ctx.save_for_backward(run_T, length_M)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        # lengths are what they say (`unsafe`): to check them would ask the device
        sums = torch.segment_reduce(wide, "sum", lengths=length_M, unsafe=True)
        return sums.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _RepeatRuns.apply(gradient, *ctx.saved_tensors), None, None


def count_bias(newest_T: Tensor, run_M: Tensor, weighting: str) -> Tensor:
    """Additive attention mask of one document's tokens against its concepts.

    `count`: log n_k(t), where n_k(t) is how many tokens up to t have concept k as their newest;
    attention with it equals attention over replicated concepts under a causal mask. `uniform`:
    0, which is Eq. 14. Concepts that t does not see get -inf.

    Args:
        newest_T: newest visible concept of each token, counted in its document, int64
            (tokens of the document,).
        run_M: tokens that have each concept as their newest, int64 (concepts of the document,).
        weighting: `count` or `uniform`.

    Returns:
        fp64 (tokens, concepts).
    """
    newest_T1 = newest_T.unsqueeze(1)
    concept_M = torch.arange(run_M.numel(), device=newest_T.device)
    shape = (newest_T.numel(), run_M.numel())
    bias = torch.zeros(shape, dtype=torch.float64, device=newest_T.device)
    if weighting == "count":
        # n_k(t) grows while k is the newest concept, up to the whole run
        start_M = run_M.cumsum(0) - run_M
        token_T1 = torch.arange(newest_T.numel(), device=newest_T.device).unsqueeze(1)
        bias = torch.minimum(token_T1 - start_M + 1, run_M).clamp(min=1).double().log()
    return bias.masked_fill(concept_M > newest_T1, -torch.inf)
