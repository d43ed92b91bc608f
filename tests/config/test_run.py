"""Sections refuse what they can judge alone, the run what spans them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadlcm.config import InputError, config_keys, load_config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.micro_batch_size=3"], "not a multiple of training.micro_batch_size = 3"),
        (["training.global_batch_size=0"], r"training\.global_batch_size = 0"),
        (["training.train_tokens=1e6", "training.train_steps=1"], "only one may be given"),
        (["training.train_steps=null"], "are both null, .*; give one of the two"),
        (["training.train_steps=0"], r"training\.train_steps = 0"),
        (["training.max_grad_norm=-1"], "must be a number >= 0"),
        (["training.precision=bf16", "parallel.zero_stage=0"], r"set parallel\.zero_stage=1"),
        (["parallel.zero_stage=4"], "must be one of 0, 1, 2, 3"),
        (
            ["parallel.tensor_parallel_size=3"],
            "must be divisible by parallel.tensor_parallel_size = 3",
        ),
        (
            ["parallel.pipeline_parallel_size=2", "parallel.zero_stage=2"],
            "must be 0 or 1 with parallel.pipeline_parallel_size = 2",
        ),
        (["parallel.tensor_parallel_size=0"], r"parallel\.tensor_parallel_size = 0"),
        (["parallel.sequence_parallel=true"], "leave it false"),
        (["optimizer.learning_rate=0"], r"optimizer\.learning_rate = 0\.0, must be > 0"),
        (["optimizer.betas=[0.9, 1.0]"], "must be >= 0 and < 1"),
        (["schedule.decay_fraction=20"], "a share, not a percentage"),
        (["schedule.warmup_steps=-1"], r"schedule\.warmup_steps = -1"),
        (["mup.base_width=0"], r"mup\.base_width = 0"),
        (["checkpoint.keep=-1"], r"checkpoint\.keep = -1"),
        (["checkpoint.keep_every=-1"], r"checkpoint\.keep_every = -1"),
        (["evaluation.batch_tokens=0"], r"evaluation\.batch_tokens = 0"),
        (["logging.interval_steps=0"], r"logging\.interval_steps = 0"),
        (["logging.peak_tflops=0"], r"logging\.peak_tflops = 0"),
        (["seed=-1"], "^seed = -1"),
        (["output_dir=''"], "^output_dir is empty"),
        (["data.seq_len=0"], r"data\.seq_len = 0"),
    ],
)
def test_a_wrong_run_is_refused_in_one_line(
    run_file: Path, overrides: list[str], message: str
) -> None:
    load_config(run_file)  # the run itself is fine
    with pytest.raises(InputError, match=message) as caught:
        load_config(run_file, overrides)
    assert "\n" not in str(caught.value)
    if "seq_len" not in message:  # that rule is of the data
        assert caught.value.key in config_keys() and caught.value.key in str(caught.value)


def test_a_budget_in_tokens_is_rounded_up_to_whole_steps(run_file: Path) -> None:
    budget = ["training.train_steps=null", "training.train_tokens=1025"]
    config = load_config(run_file, budget)
    assert (config.step_tokens, config.total_steps) == (1024, 2)
    assert load_config(run_file).total_steps == 10


def test_a_budget_on_the_command_line_replaces_the_one_of_the_file(run_file: Path) -> None:
    by_tokens = load_config(run_file, ["training.train_tokens=4096"])
    assert (by_tokens.training.train_steps, by_tokens.total_steps) == (None, 4)
    text = run_file.read_text(encoding="utf-8").replace("train_steps: 10", "train_tokens: 4096")
    run_file.write_text(text, encoding="utf-8")
    assert load_config(run_file).total_steps == 4
    assert load_config(run_file, ["training.train_steps=7"]).total_steps == 7


def test_null_on_the_command_line_replaces_no_budget(run_file: Path) -> None:
    """It gives no length: taking the file's away for it would leave the run without one."""
    assert load_config(run_file, ["training.train_tokens=null"]).total_steps == 10
    swapped = ["training.train_tokens=4096", "training.train_steps=null"]
    assert load_config(run_file, swapped).total_steps == 4
    withdrawn = ["training.train_tokens=4096", "training.train_tokens=null"]
    assert load_config(run_file, withdrawn).total_steps == 10


def test_a_budget_given_twice_in_a_file_is_refused(run_file: Path) -> None:
    text = run_file.read_text(encoding="utf-8")
    text = text.replace("train_steps: 10", "train_steps: 10\n  train_tokens: 4096")
    run_file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="only one may be given"):
        load_config(run_file)


def test_bf16_trains_from_stage_one_on(run_file: Path) -> None:
    assert load_config(run_file, ["training.precision=bf16"]).parallel.zero_stage == 1
