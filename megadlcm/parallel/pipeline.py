"""Runs a model whose chunks lie on several stages; one stage with one chunk is the smallest case.

What crosses from chunk to chunk, for each micro-batch of T tokens and M concepts:

| edge                                 | forward                                | backward     |
|--------------------------------------|----------------------------------------|--------------|
| to the next chunk                    | token (T, D) or concept states (M, C)  | its gradient |
| the same, after the segmentation     | T bytes of decisions, T fp32 scores    | -            |
| segmentation -> concept reader       | token states (T, D), straight          | its gradient |
| the same, mode `ema_ste`             | T fp32 scores, of which it has gradient| its gradient |

M is known from the decisions, which come first, and T from the stage's own copy of the data: no
message carries a shape, none is cut off, and the backward pass of a chunk runs once however many
tensors left it. Sends do not block. A stage receives from each other stage in the order in which
that one sends, which it knows from the schedule, and puts aside what it needs later; so two stages
can never wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.model import LanguageModel
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.model.output import ModelOutput
from megadlcm.model.units import Flow, MicroBatch, run_units, segment, start_flow
from megadlcm.parallel.collectives import rows_of_part
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.messages import Message, Passage, Root, Traffic
from megadlcm.parallel.partition import Partition
from megadlcm.parallel.watch.watchdog import doing
from megadlcm.plan.schedule import Operation, Schedule, pipeline_schedule
from megadlcm.plan.stages import READER, SEGMENTATION, Chunk

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
        self.is_sequence_parallel = config.parallel.sequence_parallel
        units = {unit.name: chunk.index for chunk in self.chunks for unit in chunk.units}
        self.segmentation: int | None = units.get(SEGMENTATION)
        self.reader: int | None = units.get(READER)
        self.sends_confidence = config.model.boundary.is_straight_through
        self._mailbox: dict[Message, Tensor] = {}
        self._expected: dict[int, deque[Message]] = {}
        self._sending: list[tuple[Any, Tensor]] = []
        self._flows: list[MicroBatch] = []
        self._passages: dict[tuple[int, int], Passage] = {}
        self._schedules: dict[tuple[int, int | None], Schedule] = {}

    @property
    def owns_segmentation(self) -> bool:
        """Whether this stage holds the boundary detector."""
        return self.segmentation is not None and self.chunks[self.segmentation].stage == self.stage

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
                self._passages[operation.chunk, operation.micro_batch] = passage
            else:
                self._run_backward(operation, backward, index == len(operations) - 1)
        self._finish()

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[MicroBatch],
        consume: Callable[[int, Flow], None],
        until: str | None = None,
    ) -> None:
        """Runs forward passes only, without a gradient.

        Args:
            batches: micro-batches of this replica, the same on all its processes.
            consume: called in order, with index and result, on the stage where they end.
            until: the unit after which they end; None for the whole model.
        """
        last = len(self.chunks) - 1 if until is None else self.partition.chunk_of(until)
        size = _FORWARD_GROUP * len(self.chunks)
        for start in range(0, len(batches), size):
            # no backward pass holds the first stage back, and what it sends must lie somewhere
            group = batches[start : start + size]
            for index, flow in self._forward(group, last, until):
                consume(start + index, flow)

    def _forward(
        self, batches: Sequence[MicroBatch], last: int, until: str | None
    ) -> Iterator[tuple[int, Flow]]:
        """Runs a group of micro-batches; waits in the end until all that was sent has arrived."""
        schedule = self.schedule(len(batches), last)
        self._begin(batches, schedule)
        # stages after the last chunk have nothing to do
        operations = [*schedule.operations, *[()] * len(self.chunks)][self.stage]
        for operation in operations:
            chunk = self.chunks[operation.chunk]
            passage = self._receive_inputs(chunk, operation.micro_batch)
            names = list(chunk.names)
            if until in names:
                names = names[: names.index(until) + 1]
            run_units(self.model, names, passage.flow)
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
        self._flows = list(batches)
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
            return [
                Message(f"gradient of {name}", chunk, source, micro_batch)
                for name, source in self._inputs_with_gradient(chunk)
            ]
        messages = []
        if chunk < last:
            names = ["states"]
            if self.segmentation is not None and chunk >= self.segmentation:
                names = ["decisions", "scores", "states"]
            messages += [Message(name, chunk, chunk + 1, micro_batch) for name in names]
        if chunk == self.segmentation and self.reader is not None and chunk < self.reader <= last:
            names = ["hidden", "confidence"] if self.sends_confidence else ["hidden"]
            messages += [Message(name, chunk, self.reader, micro_batch) for name in names]
        return messages

    def _inputs_with_gradient(self, chunk: int) -> list[tuple[str, int]]:
        """Name and source of what a chunk gets and sends a gradient for."""
        inputs = [("states", chunk - 1)] if chunk > 0 else []
        if chunk == self.reader and self.segmentation is not None and self.segmentation < chunk:
            inputs.append(("hidden", self.segmentation))
            if self.sends_confidence:
                inputs.append(("confidence", self.segmentation))
        return inputs

    def _send(self, message: Message, tensor: Tensor) -> None:
        target = self.chunks[message.target].stage
        tensor = tensor.detach().contiguous()
        if target == self.stage:
            self._mailbox[message] = tensor
            return
        self.traffic.add(message, tensor)
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        group = self.mesh.pipeline_group(self.stage, target)
        with doing(f"pipeline send to stage {target}: {message.name}"):
            work = dist.isend(tensor, dst=self.mesh.rank_of_stage(target), group=group)
        self._sending.append((work, tensor))

    def _receive(self, message: Message) -> Tensor:
        source = self.chunks[message.source].stage
        while message not in self._mailbox:
            arriving = self._expected[source].popleft()
            tensor = self._empty(arriving)
            group = self.mesh.pipeline_group(source, self.stage)
            what = f"pipeline receive from stage {source}: {arriving.name}"
            with doing(f"{what}, micro-batch {arriving.micro_batch}"):
                dist.recv(tensor, src=self.mesh.rank_of_stage(source), group=group)
            self._mailbox[arriving] = tensor
        return self._mailbox.pop(message)

    def _empty(self, message: Message) -> Tensor:
        """Room for a message that is about to arrive."""
        name, source, target, micro_batch = message
        if name.startswith("gradient of "):
            outputs = self._passages[target, micro_batch].outputs
            return torch.empty_like(outputs[name.removeprefix("gradient of ")])
        tokens_T = self._flows[micro_batch].tokens_T
        num_tokens, device = tokens_T.numel(), tokens_T.device
        if name == "decisions":
            return torch.empty(num_tokens, dtype=torch.uint8, device=device)
        if name in ("scores", "confidence"):
            return torch.empty(num_tokens, dtype=self._score_type, device=device)
        config, num_rows, width = self.model.config, num_tokens, self.model.config.d_token
        if name == "states" and self.chunks[source].units[-1].stream == "concepts":
            # its decisions were sent first
            decisions = self._mailbox[Message("decisions", source, target, micro_batch)]
            num_rows, width = int((decisions & 1).sum()), config.d_concept
        if name == "states" and self.is_sequence_parallel:
            num_rows = rows_of_part(num_rows, self.mesh.tensor_parallel_size)
        return torch.empty(num_rows, width, dtype=self._state_type, device=device)

    @property
    def _state_type(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def _score_type(self) -> torch.dtype:
        return torch.promote_types(self._state_type, torch.float32)

    def _finish(self) -> None:
        """Waits until everything that was sent has arrived."""
        for work, _ in self._sending:
            with doing("pipeline send: end of the step"):
                work.wait()
        self._sending = []
        assert not self._mailbox and not any(self._expected.values()), "a message was not used"

    # -- one operation ----------------------------------------------------------------------------

    def _receive_inputs(self, chunk: Chunk, micro_batch: int) -> Passage:
        passage = Passage(start_flow(self.model, self._flows[micro_batch]))
        flow, index = passage.flow, chunk.index
        if index == 0:
            return passage
        needs_gradient = torch.is_grad_enabled()
        if self.segmentation is not None and self.segmentation < index:
            # shapes follow from the decisions, so they stay in the mailbox until the states came
            states = self._receive(Message("states", index - 1, index, micro_batch))
            decisions = self._receive(Message("decisions", index - 1, index, micro_batch))
            prob_T = self._receive(Message("scores", index - 1, index, micro_batch))
        else:
            states = self._receive(Message("states", index - 1, index, micro_batch))
            decisions = None
        passage.inputs["states"] = states.requires_grad_(needs_gradient)
        flow.states = states
        if index == self.reader and self.segmentation is not None and self.segmentation < index:
            hidden_TD = self._receive(Message("hidden", self.segmentation, index, micro_batch))
            passage.inputs["hidden"] = hidden_TD.requires_grad_(needs_gradient)
            flow.hidden_TD = hidden_TD
            if self.sends_confidence:
                message = Message("confidence", self.segmentation, index, micro_batch)
                prob_T = self._receive(message).requires_grad_(needs_gradient)
                passage.inputs["confidence"] = prob_T
        if decisions is not None:
            boundary = BoundaryOutput(prob_T, (decisions & 1).bool(), (decisions & 2).bool())
            segment(flow, boundary, self.model.config.segment_align)
        return passage

    def _send_outputs(
        self, chunk: Chunk, micro_batch: int, passage: Passage, last: int | None = None
    ) -> None:
        flow, boundary = passage.flow, passage.flow.boundary
        last = len(self.chunks) - 1 if last is None else last
        for message in self._messages(Operation("forward", chunk.index, micro_batch), last):
            if message.name == "decisions":
                assert boundary is not None
                tensor = boundary.mask_T.to(torch.uint8) | boundary.threshold_mask_T.to(
                    torch.uint8
                ).mul(2)
            elif message.name in ("scores", "confidence"):
                assert boundary is not None
                tensor = boundary.prob_T
            else:
                found = flow.states if message.name == "states" else flow.hidden_TD
                assert found is not None
                tensor = found
            if message.name not in ("decisions", "scores"):
                passage.outputs[message.name] = tensor
            self._send(message, tensor)

    def _run_backward(
        self, operation: Operation, backward: Callable[[Tensor, bool], None], is_last: bool
    ) -> None:
        _, chunk, micro_batch = operation
        passage = self._passages[chunk, micro_batch]
        targets = {"states": chunk + 1, "hidden": self.reader, "confidence": self.reader}
        outputs, gradients = [], []
        for name, output in passage.outputs.items():
            target = targets[name]
            assert target is not None
            gradients.append(
                self._receive(Message(f"gradient of {name}", target, chunk, micro_batch))
            )
            outputs.append(output)
        del self._passages[chunk, micro_batch]
        loss = passage.loss
        if outputs:
            root: Tensor = Root.apply(gradients, *outputs)
            loss = root if loss is None else loss + root
        assert loss is not None
        backward(loss, is_last)
        for message in self._messages(operation, len(self.chunks) - 1):
            gradient = passage.inputs[message.name.removeprefix("gradient of ")].grad
            assert gradient is not None, f"{message} has none"
            self._send(message, gradient)
