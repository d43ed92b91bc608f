"""What autograd really keeps and makes, in bytes, unit by unit."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadlcm.config import RunConfig
from megadlcm.config.anatomy import UnitId, UnitKind, unit_ids
from megadlcm.model import LanguageModel, build_model
from megadlcm.model.units import Flow, MicroBatch, run_units, start_flow


class LiveTensors(TorchDispatchMode):
    """Follows every tensor that an operation makes until its memory is free.

    Hooks on saved tensors would miss what selective recomputation keeps outside of autograd.
    """

    def __init__(self, ignored: Sequence[Tensor] = (), follows_peak: bool = False) -> None:
        super().__init__()
        self.follows_peak = follows_peak
        self.ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.ignored:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.follows_peak:
            self.peak = max(self.peak, self.num_bytes)
        return made

    @property
    def num_bytes(self) -> int:
        """Bytes in use now."""
        expired = [key for key, (reference, _) in self.live.items() if reference.expired()]
        for key in expired:
            del self.live[key]
        return sum(num_bytes for _, num_bytes in self.live.values())


@dataclass(frozen=True)
class Measured:
    """What one micro-batch kept."""

    units: dict[UnitId, int]
    """Bytes that each unit keeps, with its input and without its output."""
    num_concepts: int
    """Concepts, 0 for the dense model."""
    num_tokens: int
    """Tokens."""


def probe_model(config: RunConfig, model: LanguageModel | None = None) -> LanguageModel:
    """The model of a run, or the given one, ready for a step."""
    model = model or build_model(config.model, config.mup)
    model = model.bfloat16() if config.training.precision == "bf16" else model
    model.set_recompute(config.parallel.recompute)
    return model.train()


def probe_batch(config: RunConfig, lengths: Sequence[int]) -> MicroBatch:
    """Random tokens in documents of these lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(config.model.vocab_size, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return MicroBatch(tokens_T, cu_seqlens)


def measure_units(
    config: RunConfig, lengths: Sequence[int], model: LanguageModel | None = None
) -> Measured:
    """Runs 1, 2, ... units and takes the differences of what is alive afterwards."""
    model, batch = probe_model(config, model), probe_batch(config, lengths)
    units = unit_ids(config.model)
    kept, before, num_concepts = {}, 0, 0
    # a collection visits only what was made since: with the modules it takes a fifth of a second
    gc.freeze()
    for count, unit in enumerate(units, start=1):
        live = LiveTensors(list(model.parameters()))
        with live:
            flow, loss = _forward(model, batch, units[:count])
        assert flow.states is not None
        root = (flow.states.grad_fn, loss)
        flow.states = None
        gc.collect()
        num_bytes = _settled(live)
        kept[unit], before = num_bytes - before, num_bytes
        num_concepts = flow.layout.num_concepts if flow.layout else 0
        del root
    gc.unfreeze()
    return Measured(kept, num_concepts, sum(lengths))


def measure_peak(config: RunConfig, lengths: Sequence[int]) -> tuple[int, int]:
    """Most bytes in use in a forward and a backward pass, apart from weights and their gradients;
    and the concepts."""
    model, batch = probe_model(config), probe_batch(config, lengths)
    units = unit_ids(config.model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live = LiveTensors([*model.parameters(), *gradients], follows_peak=True)
    with live:
        flow, loss = _forward(model, batch, units)
        assert loss is not None
        if flow.boundary is not None and flow.boundary.prob_T.requires_grad:
            loss = loss + flow.boundary.prob_T.sum()
        loss.backward()
    return live.peak, flow.layout.num_concepts if flow.layout else 0


def _forward(
    model: LanguageModel, batch: MicroBatch, units: Sequence[UnitId]
) -> tuple[Flow, Tensor | None]:
    flow = start_flow(model, batch)
    run_units(model, units, flow)
    if units[-1].kind is not UnitKind.LM_HEAD:
        return flow, None
    return flow, flow.output.token_losses(batch.tokens_T).sum()


def _settled(live: LiveTensors) -> int:
    """Bytes in use once the threads that communicate have let go of their last tensors."""
    if not dist.is_initialized():
        return live.num_bytes
    dist.barrier()
    readings = []
    for _ in range(10):
        readings.append(live.num_bytes)
        time.sleep(0.005)
    return min(readings)
