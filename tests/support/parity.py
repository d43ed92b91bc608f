"""What ranks do in a parity test: a few SGD steps on some layout, with every gradient.

SGD and gradients, because Adam hides a gradient that is wrong by a factor. Every function is
collective and runs in a single process too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import TrainStep, global_batch_digest
from megadlcm.model.boundary_detector import BoundaryOutput
from megadlcm.training.replica_loader import open_loader
from tests.support import gathering as tensors
from tests.support.layouts import no_parameter_is_too_small_to_be_partitioned
from tests.support.tiny_runs import random_text, tiny_engine, tiny_run

SEQ_LEN = 64
NUM_STEPS = 3
GLOBAL_BATCH = 8


class Layout(NamedTuple):
    """How a run is spread over processes."""

    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 0
    sequence: bool = False
    recompute: str = "none"
    placement: str = "linear"
    micro: int = 1
    precision: str = "fp32"

    def keys(self) -> dict[str, Any]:
        """Its section `parallel`."""
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "zero_stage": self.zero_stage,
            "sequence_parallel": self.sequence,
            "recompute": self.recompute,
            "pipeline_placement": self.placement,
            "check_agreement": self.tensor > 1,
        }


@dataclass
class Trace:
    """What the steps of a run did; tensors are whole and on rank 0 only."""

    losses: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    group_norms: list[dict[str, float]] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    model: dict[str, Tensor] = field(default_factory=dict)
    concepts: list[int] = field(default_factory=list)
    """Concepts of each micro-batch that this process segmented."""
    tokens: list[int] = field(default_factory=list)
    """Its tokens."""
    sent: dict[str, int] = field(default_factory=dict)


def all_layouts(world_size: int) -> list[Layout]:
    """Every layout of so many processes: tensor x pipeline x data x ZeRO x sequence x recompute."""
    layouts = []
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tensor, pipeline in itertools.product(sizes, sizes):
        if world_size % (tensor * pipeline):
            continue
        for zero_stage, sequence, recompute, placement in itertools.product(
            (0, 1) if pipeline > 1 else (0, 1, 2, 3),
            (False, True) if tensor > 1 else (False,),
            ("none", "selective", "block"),
            ("linear", "folded") if pipeline > 1 else ("linear",),
        ):
            layouts.append(Layout(tensor, pipeline, zero_stage, sequence, recompute, placement))
    return layouts


def write_uneven(corpus: Path) -> Path:
    """Adds documents of one word again and again, which make few concepts, among ordinary ones."""
    texts = []
    for seed in range(16):
        texts.append(("the " * 61).strip())
        texts += [random_text(3000 + 10 * seed + part, 7 + 9 * part) for part in range(4)]
    source = corpus / "uneven.jsonl"
    source.write_text(
        "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    )
    prepare(PrepareOptions((str(source),), corpus / "tokenizer.json", corpus / "uneven"))
    return corpus / "uneven"


def parity_run(corpus: Path, output: Path, layout: Layout, **model: Any) -> RunConfig:
    """Three steps of SGD with clipping on packed documents of uneven length."""
    shape = {
        "encoder_layers": 1,
        "backbone_layers": 2,
        "decoder_layers": 1,
        "token_heads": 8,
        "token_kv_heads": 4,
        "d_token": 32,
        "concept_heads": 8,
        "concept_kv_heads": 4,
        "d_concept": 48 if model.get("architecture") == "dense" else 64,
        "self_attention_qk_norm": True,
        "target_tokens_per_concept": 4.0,
    }
    return tiny_run(
        corpus,
        output,
        model=shape | model,
        data={"train": [{"path": str(corpus / "uneven"), "name": "uneven"}], "seq_len": SEQ_LEN},
        parallel=layout.keys(),
        training={
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": layout.micro,
            "max_grad_norm": 0.5,
            "ratio_loss_weight": 1.0,
            "precision": layout.precision,
        },
        optimizer={"name": "sgd", "learning_rate": 0.5, "weight_decay": 0.01},
    )


def trace(config: RunConfig) -> Trace:
    """Runs the steps of a config on its layout."""
    with no_parameter_is_too_small_to_be_partitioned():
        engine = tiny_engine(config)
        result, step, state = Trace(), TrainStep(engine, config), TrainState()
        with (
            contextlib.closing(open_loader(config, engine.mesh)) as loader,
            _spies(engine, result),
        ):
            for _ in range(NUM_STEPS):
                batch = next(loader)
                done = step.run(batch, state)
                result.losses.append(done.summary.loss)
                result.fractions.append(done.summary.boundary_fraction)
                result.grad_norms.append(done.grad_norm)
                result.group_norms.append(done.group_grad_norms)
                result.digests.append(global_batch_digest(engine, batch))
                state.step += 1
                state.consumed_samples += config.training.global_batch_size
        result.model = tensors.read_model(engine)
        result.sent = engine.pipeline.traffic.sent
        return result


@contextlib.contextmanager
def _spies(engine: TrainingEngine, result: Trace) -> Iterator[None]:
    """Keeps every gradient of a step before it is clipped, and counts concepts."""
    clip = TrainingEngine.clip_gradients

    def keep(self: TrainingEngine, grad_norm: float, max_grad_norm: float) -> None:
        result.gradients.append(read_gradients(self))
        clip(self, grad_norm, max_grad_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "clip_gradients", keep)
        detector = getattr(engine.model, "boundary_detector", None)
        if detector is not None:

            def count(_module: Any, _inputs: Any, output: BoundaryOutput) -> None:
                result.concepts.append(int(output.mask_T.sum()))
                result.tokens.append(output.mask_T.numel())

            detector.register_forward_hook(count)
        yield


def read_gradients(engine: TrainingEngine) -> dict[str, Tensor]:
    """Whole gradients by name, on rank 0."""
    own = dict(engine.model.named_parameters())
    found = {}
    for name, part in engine.partition.specs.items():
        if not part.is_parameter:
            continue
        value = None
        if name in own:
            whole = engine.zero_optimizer is None
            value = own[name].grad if whole else safe_get_full_grad(own[name])
            if value is None:
                value = torch.zeros_like(own[name])
        collected = tensors.collect(engine, part, value)
        if collected is not None:
            found[name] = collected.float()
    return found


def traces(configs: Sequence[RunConfig]) -> list[Trace]:
    """The runs of several layouts, one after the other in one launch."""
    return [trace(config) for config in configs]


class Difference(NamedTuple):
    """Largest relative differences of two runs."""

    loss: float
    gradient: float
    parameter: float
    norm: float


def compare(found: Trace, expected: Trace) -> Difference:
    """Compares losses, every gradient of every step, and the parameters after the last."""
    losses = [abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True)]
    norms = [abs(a - b) / b for a, b in zip(found.grad_norms, expected.grad_norms, strict=True)]
    gradients = []
    for own, others in zip(found.gradients, expected.gradients, strict=True):
        assert own.keys() == others.keys()
        gradients += [relative(own[name], others[name]) for name in others]
    assert found.model.keys() == expected.model.keys()
    parameters = [relative(found.model[name], expected.model[name]) for name in expected.model]
    return Difference(max(losses), max(gradients), max(parameters), max(norms))


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-12))
