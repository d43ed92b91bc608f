"""Runs a model whose chunks lie on several stages; one stage with one chunk is the smallest case.

What crosses from chunk to chunk is `plan.edges`: this file sends, receives and starts backward
passes by that list; of what the messages mean it knows only that decisions tell how many concepts
there are. No message carries a shape, none is cut off, and the backward pass of a chunk runs once
however many tensors left it. Sends do not block. A stage
receives from each other stage in the order in which that one sends, which it knows from the
schedule, and puts aside what it needs later; so two stages can never wait for each other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.config.anatomy import Stream, UnitKind
from megadlcm.model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.model.units import Flow, MicroBatch, run_units, start_flow
from megadlcm.parallel.collectives import rows_of_part
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.messages import (
    Message,
    Passage,
    Root,
    Traffic,
    boundary_mask,
    put_into,
    take_from,
)
from megadlcm.parallel.partition import Partition
from megadlcm.parallel.watch.activity import doing
from megadlcm.plan.edges import Content, Edge, Number, model_edges
from megadlcm.plan.schedule import Operation, Schedule, pipeline_schedule
from megadlcm.plan.stages import Chunk

_FORWARD_GROUP = 8
"""Micro-batches for each chunk that are run forward before all stages wait for each other."""


class Pipeline:
    """The chunks of this stage and their messages.

    Args:
        model: what this process holds of the model.
        config: the run.
        mesh: ranks of this process.
        partition: how the model is spread.
    """

    def __init__(
        self, model: LanguageModel, config: RunConfig, mesh: ParallelMesh, partition: Partition
    ) -> None:
        self.model, self.mesh, self.partition = model, mesh, partition
        self.chunks = partition.chunks
        self.stage = mesh.pipeline_rank
        self.traffic = Traffic()
        self._leaving: dict[int, list[Edge]] = defaultdict(list)
        self._arriving: dict[int, list[Edge]] = defaultdict(list)
        for edge in model_edges(config.model, self.chunks, config.parallel.sequence_parallel):
            self._leaving[edge.source].append(edge)
            self._arriving[edge.target].append(edge)
        self._mailbox: dict[Message, Tensor] = {}
        self._expected: dict[int, deque[Message]] = {}
        self._sending: list[tuple[Any, Tensor]] = []
        self._batches: list[MicroBatch] = []
        self._decisions: dict[int, Tensor] = {}
        self._passages: dict[tuple[int, int], Passage] = {}
        self._schedules: dict[tuple[int, int | None], Schedule] = {}

    @property
    def owns_segmentation(self) -> bool:
        """Whether this stage holds the boundary detector."""
        own = self.partition.own_chunks(self.stage)
        return any(UnitKind.SEGMENTATION in chunk.kinds for chunk in own)

    def schedule(self, num_micro_batches: int, until: int | None = None) -> Schedule:
        """The order of operations of every stage; simulated once for each number of micro-batches.

        Args:
            num_micro_batches: micro-batches of the step.
            until: for forward passes only: the last chunk that runs; None for training.
        """
        key = (num_micro_batches, until)
        if key not in self._schedules:
            chunks = self.chunks if until is None else self.chunks[: until + 1]
            self._schedules[key] = pipeline_schedule(
                [chunk.stage for chunk in chunks],
                [chunk.flops for chunk in chunks],
                num_micro_batches,
                forward_only=until is not None,
            )
        return self._schedules[key]

    def train(
        self,
        batches: Sequence[MicroBatch],
        forward: Callable[[Chunk, int, Flow], Tensor | None],
        backward: Callable[[Tensor, bool], None],
    ) -> None:
        """Runs forward and backward passes of a step.

        Args:
            batches: micro-batches of this replica.
            forward: runs a chunk on a flow, of which micro-batch; returns its share of the loss.
            backward: runs the backward pass of a scalar; whether it is the last one of the step.
        """
        schedule = self.schedule(len(batches))
        operations = schedule.operations[self.stage]
        self._begin(batches, schedule)
        for index, operation in enumerate(operations):
            chunk = self.chunks[operation.chunk]
            if operation.kind == "forward":
                passage = self._receive_inputs(chunk, operation.micro_batch)
                passage.loss = forward(chunk, operation.micro_batch, passage.flow)
                self._send_outputs(chunk, operation.micro_batch, passage)
                # the graph lives on: outputs of this chunk are roots of its backward pass
                self._passages[operation.chunk, operation.micro_batch] = passage
            else:
                self._run_backward(operation, backward, index == len(operations) - 1)
        self._finish()

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[MicroBatch],
        consume: Callable[[int, Flow], None],
        until: UnitKind | None = None,
    ) -> None:
        """Runs forward passes only, without a gradient.

        Args:
            batches: micro-batches of this replica, the same on all its processes.
            consume: called in order, with index and result, on the stage where they end.
            until: the unit after which they end, of which there is one; None for the whole model.
        """
        last = len(self.chunks) - 1 if until is None else self.partition.chunk_of(until)
        size = _FORWARD_GROUP * len(self.chunks)
        for start in range(0, len(batches), size):
            # no backward pass holds the first stage back, and what it sends must lie somewhere
            group = batches[start : start + size]
            for index, flow in self._forward(group, last, until):
                consume(start + index, flow)

    def _forward(
        self, batches: Sequence[MicroBatch], last: int, until: UnitKind | None
    ) -> Iterator[tuple[int, Flow]]:
        """Runs a group of micro-batches; waits in the end until all that was sent has arrived."""
        schedule = self.schedule(len(batches), last)
        self._begin(batches, schedule)
        # stages after the last chunk have nothing to do
        operations = [*schedule.operations, *[()] * len(self.chunks)][self.stage]
        for operation in operations:
            chunk = self.chunks[operation.chunk]
            passage = self._receive_inputs(chunk, operation.micro_batch)
            units = list(chunk.unit_ids)
            if until in chunk.kinds:
                units = units[: [unit.kind for unit in units].index(until) + 1]
            run_units(self.model, units, passage.flow)
            if operation.chunk == last:
                yield operation.micro_batch, passage.flow
            else:
                self._send_outputs(chunk, operation.micro_batch, passage, last)
        self._finish()

    def outputs(
        self, batches: Sequence[MicroBatch], consume: Callable[[int, ModelOutput], None]
    ) -> None:
        """Runs the whole model on each micro-batch; outputs appear where the head is."""
        self.forward(batches, lambda index, flow: consume(index, flow.output))

    def output(self, tokens_T: Tensor, cu_seqlens: Tensor) -> ModelOutput | None:
        """Runs the whole model on one micro-batch; None where the head is not."""
        found: list[ModelOutput] = []
        self.outputs([MicroBatch(tokens_T, cu_seqlens)], lambda _, output: found.append(output))
        return found[0] if found else None

    def share_from_head(self, value: Any) -> Any:
        """Hands a picklable value of the last chunk's stage to the other stages of the replica."""
        if len({chunk.stage for chunk in self.chunks}) == 1:
            return value
        values = self.mesh.gather_over_pipeline(value)
        return values[self.chunks[-1].stage]

    # -- messages ---------------------------------------------------------------------------------

    def _begin(self, batches: Sequence[MicroBatch], schedule: Schedule) -> None:
        assert not self._mailbox and not self._passages and not self._sending
        self._batches, self._decisions = list(batches), {}
        last = len(schedule.stage_of_chunk) - 1
        self._expected = {
            stage: deque(
                message
                for operation in operations
                for message in self._messages(operation, last)
                if self.chunks[message.target].stage == self.stage
            )
            for stage, operations in enumerate(schedule.operations)
            if stage != self.stage
        }

    def _messages(self, operation: Operation, last: int) -> list[Message]:
        """What an operation sends, in order; also to chunks of the same stage."""
        kind, chunk, micro_batch = operation
        if kind == "backward":
            edges = [edge for edge in self._arriving[chunk] if edge.has_gradient]
            # the chunk before waits for its states; what skipped chunks is needed later
            edges.sort(key=lambda edge: edge.content is not Content.STATES)
            return [Message(edge, micro_batch, is_gradient=True) for edge in edges]
        return [Message(edge, micro_batch) for edge in self._leaving[chunk] if edge.target <= last]

    def _send(self, message: Message, tensor: Tensor) -> None:
        target = self.chunks[message.target].stage
        # detached even within a stage: each chunk has a backward pass of its own
        tensor = tensor.detach().contiguous()
        if target == self.stage:
            self._mailbox[message] = tensor
            return
        self.traffic.add(message, tensor)
        # a tensor must live until it has left; what has may go
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        group = self.mesh.pipeline_group(self.stage, target)
        with doing(f"pipeline send to stage {target}: {message.name}"):
            work = dist.isend(tensor, dst=self.mesh.rank_of_stage(target), group=group)
        self._sending.append((work, tensor))

    def _receive(self, message: Message) -> Tensor:
        source = self.chunks[message.source].stage
        while message not in self._mailbox:
            # in the order of the sender: what comes before the message is put aside
            arriving = self._expected[source].popleft()
            tensor = self._empty(arriving)
            group = self.mesh.pipeline_group(source, self.stage)
            what = f"pipeline recv from stage {source}: {arriving.name}"
            with doing(f"{what}, micro-batch {arriving.micro_batch}"):
                dist.recv(tensor, src=self.mesh.rank_of_stage(source), group=group)
            self._mailbox[arriving] = tensor
            if arriving.edge.content is Content.DECISIONS:
                # states follow, and no message carries how many concepts they are
                self._decisions[arriving.micro_batch] = tensor
        return self._mailbox.pop(message)

    def _empty(self, message: Message) -> Tensor:
        """Room for a message that is about to arrive."""
        edge, micro_batch, is_gradient = message
        if is_gradient:
            return torch.empty_like(self._passages[edge.source, micro_batch].outputs[edge])
        tokens_T = self._batches[micro_batch].tokens_T
        num_rows = tokens_T.numel()
        if edge.rows is Stream.CONCEPTS:
            # copied to the host only here: chunks after the reader need not wait for the device
            num_rows = int(boundary_mask(self._decisions[micro_batch]).sum())
        if edge.is_sharded:
            num_rows = rows_of_part(num_rows, self.mesh.tensor_parallel_size)
        shape = (num_rows, edge.width) if edge.number is Number.STATE else (num_rows,)
        return torch.empty(shape, dtype=self._dtype(edge.number), device=tokens_T.device)

    def _dtype(self, number: Number) -> torch.dtype:
        if number is Number.DECISION:
            return torch.uint8
        # asked each time: a model may be cast after its pipeline was made
        of_states = next(self.model.parameters()).dtype
        wide = torch.promote_types(of_states, torch.float32)
        return wide if number is Number.SCORE else of_states

    def _finish(self) -> None:
        """Waits until everything that was sent has arrived."""
        for work, _ in self._sending:
            with doing("pipeline send: end of the step"):
                work.wait()
        self._sending, self._decisions = [], {}
        assert not self._mailbox and not any(self._expected.values()), "a message was not used"

    # -- one operation ----------------------------------------------------------------------------

    def _receive_inputs(self, chunk: Chunk, micro_batch: int) -> Passage:
        passage = Passage(start_flow(self.model, self._batches[micro_batch]))
        arrived: dict[Content, Tensor] = {}
        for edge in self._arriving[chunk.index]:
            tensor = self._receive(Message(edge, micro_batch))
            if edge.has_gradient:
                passage.inputs[edge] = tensor.requires_grad_(torch.is_grad_enabled())
            arrived[edge.content] = tensor
        if arrived:
            put_into(passage.flow, arrived, self.model.config.segment_align)
        return passage

    def _send_outputs(
        self, chunk: Chunk, micro_batch: int, passage: Passage, last: int | None = None
    ) -> None:
        operation = Operation("forward", chunk.index, micro_batch)
        last = len(self.chunks) - 1 if last is None else last
        for message in self._messages(operation, last):
            tensor = take_from(passage.flow, message.edge.content)
            if message.edge.has_gradient:
                passage.outputs[message.edge] = tensor
            self._send(message, tensor)

    def _run_backward(
        self, operation: Operation, backward: Callable[[Tensor, bool], None], is_last: bool
    ) -> None:
        _, chunk, micro_batch = operation
        passage = self._passages[chunk, micro_batch]
        gradients = [self._receive(Message(edge, micro_batch, True)) for edge in passage.outputs]
        del self._passages[chunk, micro_batch]
        loss = passage.loss
        if passage.outputs:
            root: Tensor = Root.apply(gradients, *passage.outputs.values())
            # one backward pass from all of them: several would run through the same graph again
            loss = root if loss is None else loss + root
        assert loss is not None
        backward(loss, is_last)
        for message in self._messages(operation, len(self.chunks) - 1):
            gradient = passage.inputs[message.edge].grad
            assert gradient is not None, f"{message} has none"
            self._send(message, gradient)
