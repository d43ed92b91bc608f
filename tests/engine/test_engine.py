from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig
from megadlcm.engine.engine import (
    TrainingEngine,
    check_deepspeed_version,
    deepspeed_dictionary,
    square_sum,
)
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import TrainStep
from tests.support.parity import read_gradients
from tests.support.tiny_runs import step_loader, tiny_engine

GOLDEN = Path(__file__).parent.parent / "golden" / "deepspeed_dictionary.json"


def test_the_deepspeed_dictionary_is_the_recorded_one(make_run: Callable[..., RunConfig]) -> None:
    """Any change of a key changes what is trained: record it on purpose or not at all."""
    config = make_run(
        training={
            "global_batch_size": 24,
            "micro_batch_size": 3,
            "precision": "bf16",
            "max_grad_norm": 0.5,
        },
        parallel={"zero_stage": 1},
    )
    assert deepspeed_dictionary(config, data_parallel_size=4) == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_deepspeed_would_decide_silently_is_written_out(
    make_run: Callable[..., RunConfig], zero_stage: int
) -> None:
    config = make_run(parallel={"zero_stage": zero_stage}, training={"max_grad_norm": 0.0})
    values = deepspeed_dictionary(config, 1)
    assert values["gradient_clipping"] == 0.0  # absent means 1.0
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}  # absent means the model's
    assert values["bf16"]["enabled"] is False
    assert values["zero_optimization"]["stage"] == zero_stage
    assert values["gradient_accumulation_steps"] == 2


def test_a_global_batch_that_does_not_divide_names_the_three_numbers(
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run(training={"global_batch_size": 8, "micro_batch_size": 2})
    assert config.training.gradient_accumulation_steps(2) == 2
    with pytest.raises(InputError, match=r"global_batch_size = 8 .* 2 \* 3"):
        config.training.gradient_accumulation_steps(3)


def test_building_an_engine_in_bf16_walks_no_old_objects(
    make_run: Callable[..., RunConfig],
) -> None:
    """DeepSpeed collects all garbage a dozen times there, seconds for the objects of imports."""
    config = make_run(training={"precision": "bf16"})
    tiny_engine(config)
    visited = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            visited.append(len(gc.get_objects()))

    everything = len(gc.get_objects())
    gc.callbacks.append(count)
    try:
        tiny_engine(config)
    finally:
        gc.callbacks.remove(count)
    assert len(visited) > 10 and max(visited) < everything / 10
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("version", ["0.18.3", "0.19.2", "0.19.7", "0.20.0", "1.0.0"])
def test_a_deepspeed_whose_arithmetic_was_not_checked_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=version):
        check_deepspeed_version(version)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.8+local"])
def test_the_pinned_deepspeed_is_accepted(version: str) -> None:
    check_deepspeed_version(version)
    check_deepspeed_version()


def test_the_norm_of_millions_of_elements_keeps_its_digits() -> None:
    """Else it would depend on how ZeRO cuts the parameters; torch's own sum in fp32 does."""
    gradient = 1e-4 * torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(gradient.double().square().sum())
    cpu = torch.device("cpu")
    whole, parts = [gradient.view(3000, 1000)], list(gradient.split(1_100_000))
    assert float(square_sum(whole, cpu)) == pytest.approx(exact, rel=1e-7)
    assert float(square_sum(parts, cpu)) == pytest.approx(exact, rel=1e-7)
    assert abs(float(gradient.norm()) ** 2 / exact - 1) > 1e-5
    assert float(square_sum([], cpu)) == 0.0


@pytest.mark.parametrize(
    ("precision", "zero_stage"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
)
def test_the_gradient_norm_is_that_of_all_gradients_and_clipping_reaches_it(
    make_run: Callable[..., RunConfig],
    precision: str,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_run(
        training={"precision": precision, "max_grad_norm": 1e-3},
        parallel={"zero_stage": zero_stage},
    )
    engine = tiny_engine(config)
    loader = step_loader(config)
    whole: list[float] = []
    clip = TrainingEngine.clip_gradients

    def read(self: TrainingEngine, grad_norm: float, max_grad_norm: float) -> None:
        for _ in range(2):  # before and after
            values = torch.cat([g.flatten().double() for g in read_gradients(self).values()])
            whole.append(float(values.norm()))
            if len(whole) == 1:
                clip(self, grad_norm, max_grad_norm)

    monkeypatch.setattr(TrainingEngine, "clip_gradients", read)
    result = TrainStep(engine, config).run(next(loader), TrainState())
    loader.close()
    assert result.grad_norm == pytest.approx(whole[0], rel=1e-5)
    assert whole[1] == pytest.approx(config.training.max_grad_norm, rel=2e-2)
    assert result.grad_norm > 100 * config.training.max_grad_norm
    squares = sum(norm**2 for norm in result.group_grad_norms.values())
    assert squares == pytest.approx(result.grad_norm**2)
    assert min(result.group_grad_norms.values()) > 0
