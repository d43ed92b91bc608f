"""Saves beside the training: what is saved, what waits for what, and writers that fail or hang."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadlcm.checkpoint.rank_file import Staging
from megadlcm.checkpoint.resume import fresh_state
from megadlcm.checkpoint.save import SaveError, Saver
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.state import TrainState
from tests.support import gathering
from tests.support.checkpoints import load_tensors
from tests.support.distributed import run_distributed
from tests.support.hooked_storage import Hook, HookedStorage
from tests.support.layouts import run_steps
from tests.support.tiny_runs import tiny_engine, tiny_run

MakeRun = Callable[..., RunConfig]
LATE = 60.0


def asynchronous(**others: Any) -> dict[str, Any]:
    return {"interval_steps": 0, "async": True} | others


def begun(config: RunConfig, hook: Hook) -> tuple[TrainingEngine, TrainState, Saver]:
    """A run after its first step, and what saves it."""
    engine, state = tiny_engine(config), fresh_state(config)
    storage = HookedStorage(Path(config.output_dir) / "checkpoints", hook)
    attempt = engine.mesh.broadcast_object(uuid.uuid4().hex)
    saver = Saver(engine, config, storage, attempt)
    run_steps(engine, config, state, 1)
    return engine, state, saver


def whole(engine: TrainingEngine) -> dict[str, Tensor]:
    return gathering.read_model(engine) | gathering.read_optimizer(engine)


def names(config: RunConfig) -> list[str]:
    return sorted(os.listdir(Path(config.output_dir) / "checkpoints"))


def save_beside_a_step(config: RunConfig, has_fence: bool) -> dict[str, list[str]]:
    """Saves, and begins to copy when the next step is about to change what is copied.

    In a process of its own: stage 3 changes how torch multiplies in the whole process.
    """
    may_copy, copy = threading.Event(), Staging._copy

    def late(self: Staging, *slices: Any) -> None:
        assert may_copy.wait(LATE)
        copy(self, *slices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_copy", late)
        engine, state, saver = begun(config, lambda *_: None)
        saved = whole(engine)
        saver.request(state)
        if has_fence:
            engine.fences.insert(0, may_copy.set)
        else:
            engine.fences.clear()
        run_steps(engine, config, state, 1)
        may_copy.set()
        saver.wait()
    folder = Path(config.output_dir) / "checkpoints" / "step_0000000001"
    model, optimizer, description = load_tensors(folder)
    assert description["train_state"]["step"] == 1
    found, now = model | optimizer, whole(engine)
    assert found.keys() == saved.keys() == now.keys()
    moments = [name for name in saved if ".exp_avg" in name]
    return {
        "all": moments,
        "differ": [name for name in saved if not torch.equal(found[name], saved[name])],
        "moved": [name for name in moments if not torch.equal(now[name], saved[name])],
    }


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("has_fence", [True, False])
def test_a_save_has_the_state_of_its_step_although_training_goes_on(
    zero_stage: int, has_fence: bool, make_run: MakeRun
) -> None:
    config = make_run(checkpoint=asynchronous(), parallel={"zero_stage": zero_stage})
    (found,) = run_distributed(save_beside_a_step, 1, config, has_fence)
    assert found["moved"] == found["all"] != []
    if has_fence:
        assert found["differ"] == []
    else:  # the negative control: the copy is one of another step
        assert set(found["all"]) <= set(found["differ"])


def test_a_save_that_is_due_waits_for_the_one_before(make_run: MakeRun) -> None:
    config = make_run(checkpoint=asynchronous())
    may_write, order = threading.Event(), list[str]()

    def hook(what: str, name: str) -> None:
        order.append(f"{what} {name}")
        if what == "write" and name.startswith("rank_"):
            assert may_write.wait(LATE)

    engine, state, saver = begun(config, hook)
    saver.request(state)
    for _ in range(2):  # steps go on meanwhile
        run_steps(engine, config, state, 1)
        saver.tick()
    assert not any(name.startswith("publish") for name in order)
    waiting = threading.Timer(0.2, may_write.set)
    waiting.start()
    saver.request(state)
    assert saver.take_waited_seconds() > 0.0 == saver.take_waited_seconds()
    assert order.index("publish step_0000000001") < order.index("begin step_0000000003")
    saver.wait()
    assert names(config) == ["latest", "step_0000000001", "step_0000000003"]


def test_one_failed_save_is_logged_and_the_second_in_a_row_ends_the_run(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_run(checkpoint=asynchronous())
    fails = True

    def hook(what: str, name: str) -> None:
        if fails and what == "finish" and name.startswith("rank_"):
            raise OSError(5, "Input/output error", name)

    _, state, saver = begun(config, hook)
    saver.request(state)
    saver.wait()
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "step_0000000001 was not saved: rank 0: " in record.getMessage()
    assert "Input/output error" in record.getMessage()
    assert names(config) == []  # nothing of it is left
    fails = False
    saver.request(state)
    saver.wait()
    assert names(config) == ["latest", "step_0000000001"]
    fails = True
    state.step = 2
    saver.request(state)
    saver.wait()
    saver.request(state)
    with pytest.raises(SaveError, match="step_0000000002 was not saved: rank 0: "):
        saver.wait()
    # one that must be there is not tried again
    saver.num_failures = 0
    with pytest.raises(SaveError):
        saver.save(state)
    assert names(config) == ["latest", "step_0000000001"]


def test_a_writer_that_gets_no_further_is_named_within_a_step(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_run(checkpoint=asynchronous(timeout_seconds=0.2, max_failures=3))
    stays = threading.Event()

    def hook(what: str, name: str) -> None:
        if what == "write" and name.startswith("rank_") and not stays.is_set():
            stays.wait(LATE)

    engine, state, saver = begun(config, hook)
    saver.request(state)
    run_steps(engine, config, state, 1)
    threading.Event().wait(0.3)
    threading.Timer(0.5, stays.set).start()
    saver.tick()
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "rank 0: its writer got no further for 0" in record.getMessage()
    saver.request(state)
    saver.wait()
    assert names(config) == ["latest", "step_0000000002"]


def test_another_start_that_took_the_folder_over_is_left_alone(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    """A zombie: its machine slept, was taken for dead, and woke."""
    config = make_run(checkpoint=asynchronous())
    owner = Path(config.output_dir) / "owner.json"

    def hook(what: str, name: str) -> None:
        if what == "create" and name == "state.json":
            owner.write_text(
                '{"attempt": "ffff", "host": "h", "pid": 1, "process": "", "started": "now"}'
            )

    _, state, saver = begun(config, hook)
    with pytest.raises(SaveError, match=r"another start of the run has taken it over \(host h"):
        saver.save(state)
    assert names(config) == []


def save_while_one_fails(config: RunConfig) -> list[Any]:
    """What each process hears of a save that fails on rank 1, and what is left then."""

    def hook(what: str, name: str) -> None:
        if what == "write" and name == "rank_00001.safetensors":
            raise OSError(28, "No space left on device", name)

    engine, state, saver = begun(config, hook)
    heard = ""
    try:
        saver.save(state)
    except SaveError as error:
        heard = str(error)
    engine.mesh.barrier()
    return [heard, names(config)]


def test_every_process_hears_which_one_failed(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus, tmp_path / "run", checkpoint=asynchronous())
    for heard, left in run_distributed(save_while_one_fails, 2, config):
        assert "step_0000000001 was not saved: rank 1: " in heard and "No space left" in heard
        assert left == []
