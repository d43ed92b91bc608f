from __future__ import annotations

import dataclasses
import errno
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import InputError
from megadlcm.checkpoint.folder import find_checkpoint
from megadlcm.checkpoint.resume import fresh_state, resume
from megadlcm.checkpoint.save import SaveError
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.masters import make_states
from megadlcm.engine.state import TrainState
from megadlcm.model import DLCM
from megadlcm.run_folder import files
from megadlcm.training.checkpoint import load_model
from tests.support import gathering as tensors
from tests.support.checkpoints import load_tensors, newest_folder, start_again, train
from tests.support.damage import flip_bit
from tests.support.layouts import LayoutStep, run_steps
from tests.support.saving import save_checkpoint
from tests.support.tiny_runs import tiny_engine

RANK_FILE = "rank_00000.safetensors"
LAYOUTS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
MakeRun = Callable[..., RunConfig]


def everything(engine: TrainingEngine) -> dict[str, Tensor]:
    return tensors.read_model(engine) | tensors.read_optimizer(engine)


def unequal(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize(
    ("precision", "zero_stage", "boundary_mode"),
    [(*layout, "learned_global") for layout in LAYOUTS]
    + [("fp32", 1, "rule"), ("fp32", 1, "fixed")],
)
def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(
    make_run: MakeRun, precision: str, zero_stage: int, boundary_mode: str
) -> None:
    config = make_run(
        training={"precision": precision},
        parallel={"zero_stage": zero_stage},
        model={"boundary_mode": boundary_mode, "balanced_draw": True},
    )
    engine, state = tiny_engine(config), fresh_state(config)
    run_steps(engine, config, state, 2)
    folder = save_checkpoint(engine, config, state)
    uninterrupted = run_steps(engine, config, state, 3)
    other, resumed_state = start_again(config)
    assert resumed_state.to_dict() == json.loads((folder / files.STATE).read_text())[
        "train_state"
    ] | {"restart_count": 1}
    # bit-equal in what was saved, too
    saved_model, saved_optimizer, _ = load_tensors(folder)
    assert unequal(saved_model | saved_optimizer, everything(other)) == []
    assert run_steps(other, config, resumed_state, 3) == uninterrupted
    assert unequal(everything(engine), everything(other)) == []
    assert state.to_dict() | {"restart_count": 1} == resumed_state.to_dict()
    # and it was not equal because nothing happens
    moved = unequal(saved_model | saved_optimizer, everything(engine))
    assert {name for name, _ in engine.model.named_parameters()} < set(moved)
    assert ("boundary_detector.threshold" in moved) == (boundary_mode != "fixed")
    assert ("boundary_detector.balance" in moved) == (boundary_mode == "learned_global")


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bf16", 1)])
def test_without_the_optimizer_state_the_run_would_be_another_one(
    make_run: MakeRun, precision: str, zero_stage: int
) -> None:
    """Negative control: the comparison above sees what a checkpoint could forget."""
    config = make_run(training={"precision": precision}, parallel={"zero_stage": zero_stage})
    uninterrupted = three_more_steps(train(config, 2, save_at=(2,)), config, TrainState(2, 8))
    forgetful, _ = start_again(config)
    make_states(forgetful, ("exp_avg", "exp_avg_sq"), 2)
    resumed = three_more_steps(forgetful, config, TrainState(2, 8))
    assert resumed[0] == uninterrupted[0] and resumed[1].loss != uninterrupted[1].loss


def three_more_steps(
    engine: TrainingEngine, config: RunConfig, state: TrainState
) -> list[LayoutStep]:
    return run_steps(engine, config, state, 3)


def test_saving_does_not_disturb_the_run(make_run: MakeRun) -> None:
    undisturbed = train(make_run("left_alone"), 4)
    disturbed = train(make_run("saved"), 4, save_at=(1, 2, 3))
    assert unequal(everything(undisturbed), everything(disturbed)) == []


@pytest.mark.parametrize(("precision", "zero_stage"), LAYOUTS)
def test_a_checkpoint_holds_whole_fp32_tensors_under_the_models_names(
    make_run: MakeRun, precision: str, zero_stage: int
) -> None:
    config = make_run(training={"precision": precision}, parallel={"zero_stage": zero_stage})
    engine = train(config, 1, save_at=(1,))
    model_tensors, optimizer_tensors, description = load_tensors(newest_folder(config.output_dir))
    shapes = {name: tensor.shape for name, tensor in engine.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model_tensors.items()} == shapes
    assert {tensor.dtype for tensor in model_tensors.values()} == {torch.float32}
    names = [name for name, _ in engine.model.named_parameters()]
    assert set(optimizer_tensors) == {
        f"{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all(float(optimizer_tensors[f"{name}.step"]) == 1.0 for name in names)
    assert description["layout"] == {
        "world_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "zero_stage": zero_stage,
    }
    assert {"torch", "deepspeed", "python"} <= description["versions"].keys()


def test_a_fresh_run_has_nothing_to_resume(make_run: MakeRun) -> None:
    config = make_run()
    assert resume(tiny_engine(config), config) is None


def test_a_damaged_newest_checkpoint_costs_only_its_own_steps(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_run()
    train(config, 3, save_at=(1, 2, 3))
    checkpoints = Path(config.output_dir) / "checkpoints"
    flip_bit(checkpoints / "step_0000000003" / RANK_FILE)
    (checkpoints / f"step_0000000009.{'0' * 32}.writing").mkdir()  # a save that was killed
    with caplog.at_level(logging.WARNING):
        engine, state = start_again(config)
    assert state.step == 2 and f"step_0000000003: rank 0: {RANK_FILE}: block 0" in caplog.text
    run_steps(engine, config, state, 1)
    save_checkpoint(engine, config, state)
    assert sorted(path.name for path in checkpoints.iterdir() if "." not in path.name) == [
        "latest",
        "step_0000000001",
        "step_0000000002",
        "step_0000000003",
    ]
    assert newest_folder(config.output_dir).name == "step_0000000003"


def test_a_save_that_fails_loses_nothing_that_was_saved(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(checkpoint={"keep": 1})
    engine, state = tiny_engine(config), fresh_state(config)
    run_steps(engine, config, state, 1)
    folder = save_checkpoint(engine, config, state)
    run_steps(engine, config, state, 1)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SaveError, match="No space left"):
        patch.setattr("megadlcm.checkpoint.storage.os.write", full_disk)
        save_checkpoint(engine, config, state)
    assert newest_folder(config.output_dir) == folder
    assert start_again(config)[1].step == 1


# key that a resumed run may not change -> another value
FIXED: dict[str, Any] = {
    "model.decoder_layers": 2,
    "model.balanced_draw": True,
    "model.boundary_mode": "learned_local",
    "model.target_tokens_per_concept": 5.0,
    "mup.base_width": 8,
    "seed": 7,
    "data.seq_len": 16,
    "data.seed": 3,
    "data.shuffle_block": 2,
    "training.global_batch_size": 2,
    "training.precision": "bf16",
    "optimizer.name": "sgd",
}
FREE: dict[str, Any] = {
    "name": "another",
    "model.attention_backend": "reference",
    "model.track_threshold": False,
    "training.micro_batch_size": 1,
    "training.train_steps": 20,
    "training.max_grad_norm": 0.5,
    "parallel.zero_stage": 2,
    "parallel.recompute": "block",
    "optimizer.learning_rate": 1e-4,
    "schedule.warmup_steps": 0,
    "checkpoint.keep": 9,
    "evaluation.batch_tokens": 64,
    "logging.tensorboard": False,
    "data.valid": [],
}


def change(key: str, value: Any) -> dict[str, Any]:
    section, _, entry = key.rpartition(".")
    return {section: {entry: value}} if section else {entry: value}


@pytest.mark.parametrize("key", FIXED)
def test_what_a_resumed_run_cannot_change_is_refused_in_one_line(
    make_run: MakeRun, key: str
) -> None:
    config = make_run()
    train(config, 1, save_at=(1,))
    changed = make_run(**change(key, FIXED[key]))
    with pytest.raises(InputError) as caught:
        resume(tiny_engine(changed), changed)
    message = str(caught.value)
    assert f" {key} (" in message and f"-> {FIXED[key]!r})" in message
    assert "\n" not in message and "choose a new output_dir" in message
    assert start_again(config)[1].step == 1  # the refusal has left the checkpoint alone


@pytest.mark.parametrize("key", FREE)
def test_what_a_resumed_run_may_change_is_logged(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    train(make_run(), 1, save_at=(1,))
    with caplog.at_level(logging.INFO):
        engine, state = start_again(make_run(**change(key, FREE[key])))
    assert f"config change on resume: {key}: " in caplog.text
    run_steps(engine, make_run(**change(key, FREE[key])), state, 1)


def test_all_changes_are_refused_together(make_run: MakeRun) -> None:
    train(make_run(), 1, save_at=(1,))
    changed = make_run(seed=1, data={"shuffle_block": 5}, training={"train_steps": 9})
    with pytest.raises(InputError, match=r"data.shuffle_block .*, seed \(0 -> 1\)") as caught:
        start_again(changed)
    assert "train_steps" not in str(caught.value)


def documents(config: RunConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(config.model.vocab_size, (50,), generator=generator)
    return tokens_T, torch.tensor([0, 20, 50], dtype=torch.int32)


@pytest.mark.parametrize("architecture", ["dlcm", "dense"])
def test_the_loaded_model_is_the_trained_one(make_run: MakeRun, architecture: str) -> None:
    config = make_run(model={"architecture": architecture})
    engine = train(config, 3, save_at=(2, 3))
    run_folder = Path(config.output_dir)
    newest = load_model(run_folder)
    older = load_model(run_folder / "checkpoints" / "step_0000000002")
    assert not newest.training
    with torch.no_grad():
        expected = engine.model.eval()(*documents(config))
        loaded, other = newest(*documents(config)), older(*documents(config))
    assert torch.equal(loaded.logits_TV, expected.logits_TV)
    assert not torch.equal(other.logits_TV, expected.logits_TV)
    if isinstance(newest, DLCM):
        assert torch.equal(loaded.boundary_prob_T, expected.boundary_prob_T)
        assert torch.equal(loaded.boundary_mask_T, expected.boundary_mask_T)


@pytest.mark.parametrize("backend", ["flash_attn", "varlen"])
def test_the_model_of_a_run_with_a_kernel_runs_without_it(make_run: MakeRun, backend: str) -> None:
    config = make_run()
    engine = train(config, 1)
    shape = dataclasses.replace(config.model, attention_backend=backend)
    save_checkpoint(engine, dataclasses.replace(config, model=shape), TrainState(step=1))
    loaded = load_model(config.output_dir)
    with torch.no_grad():
        expected = engine.model.eval()(*documents(config)).logits_TV
        assert torch.equal(loaded(*documents(config)).logits_TV, expected)


def test_the_model_of_a_bf16_run_is_its_fp32_master(make_run: MakeRun) -> None:
    config = make_run(training={"precision": "bf16"})
    engine = train(config, 1, save_at=(1,))
    loaded = dict(load_model(config.output_dir).named_parameters())
    rounded = dict(engine.model.named_parameters())
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(value.bfloat16(), rounded[name]) for name, value in loaded.items())
    assert any(not torch.equal(value, rounded[name].float()) for name, value in loaded.items())


LAPTOP = """
import sys, torch
from megadlcm.training.checkpoint import load_model
model = load_model(sys.argv[1])
tokens_T = torch.arange(40) % 7
output = model(tokens_T, torch.tensor([0, 40], dtype=torch.int32))
assert output.logits_TV.isfinite().all() and output.boundary_mask_T.dtype == torch.bool
assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
assert not torch.distributed.is_initialized() and "deepspeed" not in sys.modules
"""


def test_loading_a_model_needs_neither_process_group_nor_deepspeed(make_run: MakeRun) -> None:
    config = make_run()
    train(config, 1, save_at=(1,))
    subprocess.run([sys.executable, "-c", LAPTOP, config.output_dir], check=True, timeout=120)


def test_a_path_without_a_checkpoint_is_an_error_of_one_line(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run()
    train(config, 1, save_at=(1,))
    (folder,) = (Path(config.output_dir) / "checkpoints").glob("step_*")
    assert find_checkpoint(config.output_dir).name == find_checkpoint(folder).name == folder.name
    (folder / RANK_FILE).write_bytes(b"torn")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for path, problem in (
        (tmp_path / "nowhere", "not a folder"),
        (corpus_file(tmp_path), "not a folder"),
        (empty, "no complete checkpoint"),
        (config.output_dir, "no complete checkpoint"),
        (folder, "rank_00000.safetensors has 4 bytes"),
        (empty / "checkpoints", "manifest.json is missing"),
    ):
        for load in (find_checkpoint, load_model):
            with pytest.raises(InputError, match=problem) as caught:
                load(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def corpus_file(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("no checkpoint")
    return path
