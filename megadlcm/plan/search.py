"""Which layouts fit on some machines, and which of them is fastest. No torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from data_pipeline.errors import InputError
from megadlcm.config import ParallelConfig, RunConfig
from megadlcm.config.constants import GIB
from megadlcm.config.parallel import PipelinePlacement, Recompute
from megadlcm.plan.layout import (
    Hardware,
    LayoutPlan,
    describe_layout,
    plan_layout,
    projected_utilization,
)

ASSUMED_PEAK_TFLOPS = 989.0
"""An H100's, in bf16 without sparsity; layouts cannot be compared without any speed."""
# why layouts are refused, by the key that the refusal names; sizes of the model do not divide
_REASONS = {
    "training.global_batch_size": "does not divide into micro-batches of all replicas",
    "training.precision": "bf16 needs ZeRO 1 to keep master weights",
    "parallel.zero_stage": "must be 0 or 1 with a pipeline",
    "parallel.pipeline_parallel_size": "cuts the model into more chunks than it has units",
}
_DEVICE_MEMORY = "--device-memory"


@dataclass(frozen=True)
class RankedLayout:
    """One layout that works."""

    parallel: ParallelConfig
    """Its keys."""
    description: str
    """The same in one line."""
    plan: LayoutPlan
    """What it costs."""
    step_seconds: float
    """Time of a step."""
    utilization: float
    """Share of the peak that it reaches."""


@dataclass(frozen=True)
class Ranking:
    """All layouts of a run on some machines."""

    layouts: list[RankedLayout]
    """Those that work, the fastest first."""
    refused: dict[str, int]
    """How many do not, by reason."""
    peak_tflops: float
    """Peak of one device, assumed where none was given."""


def rank_layouts(config: RunConfig, hardware: Hardware) -> Ranking:
    """Tries every size of each axis, ZeRO stage, recomputation and placement.

    Layouts of the same speed are ordered by memory. Micro-batch size and everything outside of
    the section `parallel` stay as they are.

    Args:
        config: the run; its sizes, ZeRO stage, recomputation and placement are not read.
        hardware: the machines.

    Returns:
        The layouts.
    """
    # layouts cannot be compared without a speed; the one assumed is told with them
    peak = hardware.peak_tflops or config.logging.peak_tflops or ASSUMED_PEAK_TFLOPS
    hardware = dataclasses.replace(hardware, peak_tflops=peak)
    found, refused = [], dict[str, int]()
    for keys in _candidates(hardware):
        try:
            layout = _try(config, hardware, keys)
        except InputError as error:
            reason = _reason(error.key)
            refused[reason] = refused.get(reason, 0) + 1
            continue
        found.append(layout)
    # stable: of equal layouts the simpler one, tried first, stays ahead
    found.sort(key=lambda layout: (layout.step_seconds, layout.plan.memory.total))
    return Ranking(found, dict(sorted(refused.items(), key=lambda item: -item[1])), peak)


def check_device_memory(needed: float, hardware: Hardware) -> None:
    """Refuses a run that needs more memory than a device has.

    Args:
        needed: bytes of the fullest process.
        hardware: the machines.

    Raises:
        InputError: it does not fit.
    """
    limit = hardware.device_memory_gib
    if limit is not None and needed > limit * GIB:
        raise InputError(
            f"one process needs {needed / GIB:.1f} GiB, must be <= {_DEVICE_MEMORY} = "
            f"{limit:g} GiB; raise parallel.zero_stage, set parallel.recompute=block, cut the "
            "model over more processes or lower training.micro_batch_size",
            key=_DEVICE_MEMORY,
        )


def _candidates(hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Keys of every layout; tensor parallel groups stay within a node."""
    world_size = hardware.world_size
    # between nodes the all-reduces of every layer would cost more than anything gains
    for tensor in _divisors(hardware.gpus_per_node):
        for pipeline in _divisors(world_size // tensor):
            for zero, sequence, recompute, placement in itertools.product(
                (0, 1, 2, 3),
                (False, True) if tensor > 1 else (False,),
                get_args(Recompute),
                get_args(PipelinePlacement) if pipeline > 1 else ("linear",),
            ):
                yield {
                    "tensor_parallel_size": tensor,
                    "pipeline_parallel_size": pipeline,
                    "zero_stage": zero,
                    "sequence_parallel": sequence,
                    "recompute": recompute,
                    "pipeline_placement": placement,
                }


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _try(config: RunConfig, hardware: Hardware, keys: dict[str, Any]) -> RankedLayout:
    # both replacements check the rules anew and refuse what no run could start with
    parallel = dataclasses.replace(config.parallel, **keys)
    candidate = dataclasses.replace(config, parallel=parallel)
    plan = plan_layout(candidate, hardware)
    check_device_memory(plan.memory.total, hardware)
    seconds = plan.step_seconds
    assert seconds is not None
    utilization = projected_utilization(candidate, hardware, seconds)
    assert utilization is not None
    description = describe_layout(candidate, plan.data_parallel_size)
    return RankedLayout(parallel, description, plan, seconds, utilization)


def _reason(key: str) -> str:
    """What layouts that are refused for the same key have in common."""
    if key == _DEVICE_MEMORY:
        return f"needs more than {key}"
    return f"{key} {_REASONS.get(key, 'is not divisible by the tensor parallel size')}"
