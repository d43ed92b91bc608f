"""What the pipeline keeps of a micro-batch in a chunk, and what crosses between chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadlcm.model.units import Flow


class Message(NamedTuple):
    """One tensor that crosses from one chunk to another."""

    name: str
    """`decisions`, `scores`, `states`, `hidden`, `confidence`, or `gradient of ...` these."""
    source: int
    """Chunk that made it."""
    target: int
    """Chunk that needs it."""
    micro_batch: int
    """Index of the micro-batch."""


@dataclass
class Passage:
    """One micro-batch in one chunk, between its forward and its backward pass."""

    flow: Flow
    """What the chunk made."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of other chunks that need a gradient, by name."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that other chunks will send a gradient for, by name."""
    loss: Tensor | None = None
    """What this chunk adds to the loss itself."""


@dataclass
class Traffic:
    """Bytes that this stage has sent, by kind of edge."""

    sent: dict[str, int] = field(default_factory=dict)
    """Key `source->target name`, for chunks."""

    def add(self, message: Message, tensor: Tensor) -> None:
        """Counts one message."""
        key = f"{message.source}->{message.target} {message.name}"
        self.sent[key] = self.sent.get(key, 0) + tensor.numel() * tensor.element_size()


class Root(torch.autograd.Function):
    """A zero whose backward pass starts at several tensors at once, with given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        """Makes the zero."""
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Hands out the given gradients."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients
