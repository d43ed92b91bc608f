"""A plan states what a run costs, or why it cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadlcm.config import InputError, load_config
from megadlcm.config.accounting import flops_per_token
from megadlcm.plan import Hardware, make_plan, plan_to_dict, render_plan

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_large_model_costs_what_its_baseline_costs() -> None:
    plan = make_plan(load_config(CONFIGS / "dlcm_2.3b.yaml"), Hardware())
    assert round(plan.parameters["total"] / 1e9, 3) == 2.340
    assert round(plan.control_parameters / 1e9, 3) == 1.302
    assert round(plan.matmul_ratio, 3) == 1.011
    assert round(plan.flops_ratio, 3) == 0.976


def test_the_baseline_is_its_own_control() -> None:
    plan = make_plan(load_config(CONFIGS / "dense_1.3b.yaml"), Hardware())
    assert plan.flops_ratio == plan.matmul_ratio == 1.0
    assert plan.control_parameters == plan.parameters["total"]


def test_time_is_work_over_speed() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["training.train_steps=10"])
    hardware = Hardware(num_nodes=1, gpus_per_node=2, peak_tflops=1.0, model_flops_utilization=0.5)
    plan = make_plan(config, hardware)
    work = 3 * flops_per_token(config.model, config.data.seq_len)["total"] * plan.train_tokens
    assert plan.train_tokens == 10 * config.training.global_batch_size * config.data.seq_len
    assert plan.seconds == pytest.approx(work / (2 * 0.5e12))


def test_the_peak_of_the_config_is_used_where_none_is_given() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["logging.peak_tflops=2"])
    given = make_plan(config, Hardware(peak_tflops=1.0)).seconds
    own = make_plan(config, Hardware()).seconds
    assert given is not None
    assert own == pytest.approx(given / 2)
    unknown = make_plan(load_config(CONFIGS / "quickstart.yaml"), Hardware())
    assert unknown.seconds is None
    assert "give --peak-tflops" in render_plan(unknown)


def test_more_replicas_share_the_batch_and_the_optimizer() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml")
    one, many = (make_plan(config, Hardware(nodes, 8)) for nodes in (1, 16))
    assert many.data_parallel_size == 128
    assert one.gradient_accumulation_steps == 16 * many.gradient_accumulation_steps
    assert one.memory.optimizer == pytest.approx(16 * many.memory.optimizer)
    assert one.memory.parameters == many.memory.parameters


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    with pytest.raises(InputError, match=r"training\.global_batch_size = .* is not a multiple"):
        make_plan(config, Hardware(gpus_per_node=7))


def test_a_run_that_does_not_fit_is_refused_with_the_way_out() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml")
    with pytest.raises(InputError, match=r"raise parallel\.zero_stage"):
        make_plan(config, Hardware(device_memory_gib=16))
    assert make_plan(config, Hardware(device_memory_gib=80)).memory.total < 80 * 2**30


def test_the_table_and_the_json_carry_the_same_numbers() -> None:
    plan = make_plan(load_config(CONFIGS / "quickstart.yaml"), Hardware(peak_tflops=1.0))
    values, table = plan_to_dict(plan), render_plan(plan)
    assert f"{values['parameters']['total']:,}" in table
    assert f"{values['flops_ratio']:.3f}" in table
    assert f"{values['memory_total'] / 2**30:.2f}" in table
    assert set(values["flops_per_token"]) <= set(values["parameters"])
