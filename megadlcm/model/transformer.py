"""The transformer block and stack that tokens and concepts share (LLaMA style).

Letters: T rows (tokens or concepts), D width, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadlcm.model.recompute import run_block
from megadlcm.model.seams import WHOLE, Seams
from megadlcm.ops.attention import self_attention, self_attention_step
from megadlcm.ops.packing import Packing
from megadlcm.ops.rotary import Rotation, rotate, rotation


@dataclass(frozen=True)
class StackShape:
    """Sizes of one stack of blocks."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    norm_eps: float
    rope_theta: float
    qk_norm: bool

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads


@dataclass
class KeyValueCache:
    """Keys and values of the rows of one document so far, (rows, K, H) each."""

    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values; there is at least one row."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a row and returns all rows."""
        # copies all rows each time: simple, and small beside the matrices at lengths decoded today
        self.keys = key if self.keys is None else torch.cat((self.keys, key))
        self.values = value if self.values is None else torch.cat((self.values, value))
        return self.keys, self.values


@dataclass
class StackCache:
    """What a stack keeps of one document between its rows."""

    blocks: list[KeyValueCache] = field(default_factory=list)
    """In the order of the blocks."""
    length: int = 0
    """Rows so far."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain over the last dimension, in fp32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        # a gain that is wider than the states would widen everything after it
        return F.rms_norm(states, self.gain.shape, self.gain.to(states.dtype), self.eps)


class Linear(nn.Linear):
    """A matrix without bias and without torch's own initialisation (see `scaling`)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weights to `initialize_parameters`, which knows the width groups."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        kv_width = shape.num_kv_heads * shape.head_size
        self.wq = Linear(shape.width, shape.width)
        self.wk = Linear(shape.width, kv_width)
        self.wv = Linear(shape.width, kv_width)
        self.wo = Linear(shape.width, shape.width)
        self.query_norm = RMSNorm(shape.head_size, shape.norm_eps) if shape.qk_norm else None
        self.key_norm = RMSNorm(shape.head_size, shape.norm_eps) if shape.qk_norm else None

    def project(self, states_TD: Tensor, rotary: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, N, H), keys and values (T, K, H), rotated."""
        # -1 and not a head count: a split layer holds only its own heads
        query, key, value = (
            layer(states_TD).unflatten(-1, (-1, self.head_size))
            for layer in (self.wq, self.wk, self.wv)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        # values are not rotated: places matter for scores only
        return rotate(query, rotary), rotate(key, rotary), value

    def forward(
        self, states_TD: Tensor, rotary: Rotation, packing: Packing, backend: str
    ) -> Tensor:
        """Attends inside each document; (T, D) to (T, D)."""
        query, key, value = self.project(states_TD, rotary)
        return self.wo(self_attention(query, key, value, packing, backend).flatten(1))

    def step(self, states_1D: Tensor, rotary: Rotation, cache: KeyValueCache) -> Tensor:
        """The same for the next row of one document; (1, D) to (1, D)."""
        query, key, value = self.project(states_1D, rotary)
        return self.wo(self_attention_step(query, *cache.append(key, value)).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, width: int, ffn_size: int) -> None:
        super().__init__()
        self.w_gate = Linear(width, ffn_size)
        self.w_up = Linear(width, ffn_size)
        self.w_down = Linear(ffn_size, width)

    def forward(self, states_TD: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(states_TD)) * self.w_up(states_TD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps)
        self.attention = Attention(shape)
        self.feed_forward_norm = RMSNorm(shape.width, shape.norm_eps)
        self.feed_forward = FeedForward(shape.width, shape.ffn_size)
        self.seams: Seams = WHOLE

    def forward(
        self, states_TD: Tensor, rotary: Rotation, packing: Packing, backend: str
    ) -> Tensor:
        """(T, D) to (T, D), of the rows that this process keeps."""
        seams, num_rows = self.seams, packing.num_rows
        # normed before it is gathered: with sequence parallelism each process norms its own rows
        normed_TD = seams.to_layer(self.attention_norm(states_TD), num_rows)
        attended_TD = self.attention(normed_TD, rotary, packing, backend)
        states_TD = states_TD + seams.from_layer(attended_TD)
        normed_TD = seams.to_layer(self.feed_forward_norm(states_TD), num_rows)
        return states_TD + seams.from_layer(self.feed_forward(normed_TD))

    def step(self, states_1D: Tensor, rotary: Rotation, cache: KeyValueCache) -> Tensor:
        """The same for the next row of one document, on one process; (1, D) to (1, D)."""
        attended_1D = self.attention.step(self.attention_norm(states_1D), rotary, cache)
        states_1D = states_1D + attended_1D
        return states_1D + self.feed_forward(self.feed_forward_norm(states_1D))


class Stack(nn.Module):
    """Blocks of one width, then RMSNorm; tokens and concepts use the same class.

    A pipeline stage holds only some of the blocks, under the same names, and the norm only where
    the stack ends.
    """

    norm: RMSNorm | None

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.shape = shape
        # by name: a stage that holds blocks 4 to 7 keeps their numbers in checkpoints
        self.blocks = nn.ModuleDict({str(i): Block(shape) for i in range(shape.num_layers)})
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.recompute = "none"
        self.seams: Seams = WHOLE

    @property
    def layers(self) -> list[Block]:
        """The blocks, in the order of the computation."""
        return [block for block in self.blocks.values() if isinstance(block, Block)]

    def forward(self, states_TD: Tensor, packing: Packing, backend: str) -> Tensor:
        """Runs the blocks over packed rows.

        Args:
            states_TD: (T, D).
            packing: the documents (tokens) or the concepts of each document.
            backend: attention back-end.

        Returns:
            (T, D), normalised.
        """
        states_TD = self.seams.split_rows(states_TD)
        return self.finish(self.run(states_TD, packing, backend), packing)

    def run(
        self, states_TD: Tensor, packing: Packing, backend: str, blocks: Sequence[int] | None = None
    ) -> Tensor:
        """Runs some of the blocks, by default all, on the rows that this process keeps."""
        # once for all blocks, which keep it together for the backward pass
        rotary = self._rotation(packing.position, states_TD.dtype)
        # without a gradient nothing is kept that could be computed again
        mode = self.recompute if torch.is_grad_enabled() else "none"
        for index in range(self.shape.num_layers) if blocks is None else blocks:
            block = self.blocks[str(index)]
            states_TD = run_block(block, mode, states_TD, rotary, packing, backend)
        return states_TD

    def step(self, states_1D: Tensor, cache: StackCache) -> Tensor:
        """Runs the whole stack over the next row of one document.

        Args:
            states_1D: (1, D).
            cache: the rows so far; updated in place.

        Returns:
            (1, D), normalised.
        """
        position_1 = torch.tensor([cache.length], device=states_1D.device)
        rotary = self._rotation(position_1, states_1D.dtype)
        if not cache.blocks:
            cache.blocks = [KeyValueCache() for _ in self.layers]
        for block, rows in zip(self.layers, cache.blocks, strict=True):
            states_1D = block.step(states_1D, rotary, rows)
        cache.length += 1
        assert self.norm is not None, "the stack does not end on this stage"
        normed_1D: Tensor = self.norm(states_1D)
        return normed_1D

    def _rotation(self, position_T: Tensor, dtype: torch.dtype) -> Rotation:
        return rotation(position_T, self.shape.head_size, self.shape.rope_theta, dtype)

    def finish(self, states_TD: Tensor, packing: Packing) -> Tensor:
        """Normalises the output of the last block; all rows, (T, D)."""
        assert self.norm is not None, "the stack does not end on this stage"
        return self.seams.join_rows(self.norm(states_TD), packing.num_rows)
