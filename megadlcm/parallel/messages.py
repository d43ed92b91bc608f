"""What the pipeline keeps of a micro-batch in a chunk, and how tensors get on and off an edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.model.units import Flow, segment
from megadlcm.plan.edges import Content, Edge


class Message(NamedTuple):
    """One tensor that crosses an edge, or the gradient of it, which crosses the other way."""

    edge: Edge
    """The edge."""
    micro_batch: int
    """Index of the micro-batch."""
    is_gradient: bool = False
    """Whether it is the gradient."""

    @property
    def name(self) -> str:
        return f"gradient of {self.edge.content}" if self.is_gradient else str(self.edge.content)

    @property
    def source(self) -> int:
        """Chunk that makes it."""
        return self.edge.target if self.is_gradient else self.edge.source

    @property
    def target(self) -> int:
        """Chunk that needs it."""
        return self.edge.source if self.is_gradient else self.edge.target


@dataclass
class Passage:
    """One micro-batch in one chunk, between its forward and its backward pass."""

    flow: Flow
    """What the chunk made."""
    inputs: dict[Edge, Tensor] = field(default_factory=dict)
    """Tensors of other chunks that need a gradient."""
    outputs: dict[Edge, Tensor] = field(default_factory=dict)
    """Tensors that other chunks will send a gradient for."""
    loss: Tensor | None = None
    """What this chunk adds to the loss itself."""


def take_from(flow: Flow, content: Content) -> Tensor:
    """What an edge carries, as the chunk that sends it has it."""
    boundary = flow.boundary
    if content is Content.STATES:
        tensor = flow.states
    elif content is Content.HIDDEN:
        tensor = flow.hidden_TD
    elif boundary is None:
        tensor = None
    elif content is Content.DECISIONS:
        # both in one byte: half as many messages, and they always belong together
        evaluated_T = boundary.threshold_mask_T.to(torch.uint8)
        tensor = boundary.mask_T.to(torch.uint8) | evaluated_T.mul(2)
    else:
        # named: a content that is added must not send scores by default
        assert content in (Content.SCORES, Content.CONFIDENCE), f"{content} is taken from nowhere"
        tensor = boundary.prob_T
    assert tensor is not None, f"the chunk made no {content}"
    return tensor


def boundary_mask(decisions: Tensor) -> Tensor:
    """Boundaries of which the decisions tell, bool (T,)."""
    return (decisions & 1).bool()


def put_into(flow: Flow, arrived: Mapping[Content, Tensor], align: str) -> None:
    """Continues a flow from what arrived of earlier chunks.

    Args:
        flow: the micro-batch before its first unit here; changed.
        arrived: what its edges carried.
        align: segment alignment of the model.
    """
    flow.states, flow.hidden_TD = arrived[Content.STATES], arrived.get(Content.HIDDEN)
    decisions = arrived.get(Content.DECISIONS)
    if decisions is not None:
        # where the reader has a gradient for the scores, it must be that tensor which it reads
        prob_T = arrived.get(Content.CONFIDENCE, arrived[Content.SCORES])
        boundary = BoundaryOutput(prob_T, boundary_mask(decisions), (decisions & 2).bool())
        segment(flow, boundary, align)


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

    # `torch.autograd.backward` could start there too, but DeepSpeed wants one scalar to begin with

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # let go at once: the context lives until the whole backward pass of the chunk is over
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients
