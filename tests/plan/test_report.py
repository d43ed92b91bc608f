"""A plan states what a run costs, or why it cannot work."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from megadlcm.commands.main import main
from megadlcm.commands.plan_table import render_plan, render_ranking
from megadlcm.config import InputError, load_config
from megadlcm.plan.accounting import flops_per_token
from megadlcm.plan.layout import Hardware
from megadlcm.plan.report import Plan, make_plan, plan_to_dict, ranking_to_dict
from megadlcm.plan.schedule import pipeline_schedule
from megadlcm.plan.search import rank_layouts
from megadlcm.plan.stages import cut_chunks
from tests.support.paths import CONFIGS


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
    """Where nothing is computed twice, nothing waits and sending takes no time."""
    overrides = ["training.train_steps=10", "training.ratio_statistics=previous_step"]
    config = load_config(CONFIGS / "quickstart.yaml", overrides)
    hardware = Hardware(1, 2, 1.0, 0.5, intra_node_gb=math.inf)
    plan = make_plan(config, hardware)
    work = 3 * flops_per_token(config.model, config.data.seq_len)["total"] * plan.train_tokens
    assert plan.train_tokens == 10 * config.training.global_batch_size * config.data.seq_len
    assert plan.seconds == pytest.approx(work / (2 * 0.5e12))
    assert plan.utilization == pytest.approx(0.5)


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


def large(nodes: int = 8, **hardware: float) -> Hardware:
    return Hardware(nodes, 8, 989.0, **hardware)


def test_a_pipeline_is_planned_stage_by_stage() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml", ["parallel.pipeline_parallel_size=4"])
    plan = make_plan(config, large())
    stages = plan.layout.stages
    assert plan.data_parallel_size == 16
    assert sum(stage.parameters for stage in stages) == plan.parameters["total"]
    assert sum(stage.flops_share for stage in stages) == pytest.approx(1.0)
    assert plan.layout.imbalance == pytest.approx(4 * max(stage.flops_share for stage in stages))
    assert plan.memory.total == max(stage.memory.total for stage in stages)
    assert [stage.in_flight for stage in stages] == [(4,), (3,), (2,), (1,)]
    alone = make_plan(load_config(CONFIGS / "dlcm_2.3b.yaml"), large())
    weights = sum(stage.memory.parameters for stage in stages)
    assert weights == pytest.approx(alone.memory.parameters)
    assert alone.layout.bubble == 0.0
    assert alone.layout.traffic.pipeline_total == 0.0


def test_the_bubble_shrinks_with_more_micro_batches_and_is_exact_where_it_is_extrapolated() -> None:
    def bubble(batch: int) -> float:
        overrides = ["parallel.pipeline_parallel_size=4", f"training.global_batch_size={batch}"]
        config = load_config(CONFIGS / "dlcm_2.3b.yaml", overrides)
        return make_plan(config, Hardware(1, 4)).layout.bubble

    found = [bubble(2 * count) for count in (1, 4, 16, 64, 256)]
    assert found == sorted(found, reverse=True)
    chunks = cut_chunks(load_config(CONFIGS / "dlcm_2.3b.yaml").model, 2048, 4)
    whole = pipeline_schedule([c.stage for c in chunks], [c.flops for c in chunks], 256)
    assert found[-1] == pytest.approx(whole.bubble, rel=0.01)


def test_each_alternative_for_token_states_is_weighed() -> None:
    """Riding along costs more the more stages lie between encoder and decoder."""
    overrides = ["parallel.pipeline_parallel_size=8", "training.ratio_statistics=previous_step"]
    config = load_config(CONFIGS / "dlcm_2.3b.yaml", overrides)
    traffic = make_plan(config, large()).layout.traffic
    assert traffic.pipeline_total == traffic.pipeline_straight < traffic.pipeline_riding
    replicas, tokens = 8, config.step_tokens
    skip = 2 * tokens / replicas * config.model.d_token * 2
    assert traffic.pipeline_riding - traffic.pipeline_straight == pytest.approx(2 * skip)
    folded = load_config(
        CONFIGS / "dlcm_2.3b.yaml", [*overrides, "parallel.pipeline_placement=folded"]
    )
    own = make_plan(folded, large()).layout.traffic
    assert own.pipeline_total == own.pipeline_folded == traffic.pipeline_folded


def test_counting_boundaries_first_costs_a_pass_of_the_encoder() -> None:
    def plan(*overrides: str) -> Plan:
        return make_plan(load_config(CONFIGS / "dlcm_2.3b.yaml", list(overrides)), large(1))

    counted, last = plan(), plan("training.ratio_statistics=previous_step")
    assert counted.layout.counting_seconds is not None
    assert counted.layout.compute_seconds is not None
    share = counted.layout.counting_seconds / counted.layout.compute_seconds
    flops = counted.flops_per_token
    encoder = flops["encoder"] + flops["boundary_detector"] + flops["concept_pool"]
    blocks = flops["encoder"] + flops["backbone"] + flops["decoder"]
    assert share == pytest.approx(encoder / (3 * flops["total"] + blocks))
    assert last.layout.counting_seconds == 0.0
    assert last.utilization is not None and counted.utilization is not None
    assert last.utilization > counted.utilization


def test_slower_links_and_recomputation_cost_time() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml")
    recompute = load_config(CONFIGS / "dlcm_2.3b.yaml", ["parallel.recompute=selective"])
    usual = make_plan(config, large()).layout
    slow = make_plan(config, large(inter_node_gb=1.0)).layout
    assert usual.compute_seconds is not None
    assert slow.compute_seconds == usual.compute_seconds
    assert slow.data_seconds == pytest.approx(usual.data_seconds * 300 / 8)
    less = make_plan(recompute, large()).layout
    assert less.compute_seconds is not None
    assert 1.2 < usual.compute_seconds / less.compute_seconds < 4 / 3


@pytest.mark.parametrize(
    ("overrides", "hardware", "message"),
    [
        (["pipeline_parallel_size=3"], Hardware(1, 8), "world size = 8, must be a multiple"),
        (["pipeline_parallel_size=64", "zero_stage=1"], Hardware(8, 8), "at most its 36 units"),
        (["pipeline_parallel_size=2", "zero_stage=2"], Hardware(1, 8), "must be 0 or 1 with"),
        (["tensor_parallel_size=2"], Hardware(1, 8), r"vocab_size = 128815, must be divisible"),
        (["tensor_parallel_size=5"], Hardware(1, 5), r"token_heads = 24, must be divisible"),
        (["sequence_parallel=true"], Hardware(1, 8), "needs parallel.tensor_parallel_size > 1"),
        (["zero_stage=0"], Hardware(1, 8), "set parallel.zero_stage=1"),
        ([], Hardware(1, 3), "is not a multiple"),
        ([], Hardware(1, 1, device_memory_gib=40.0), "must be <= --device-memory = 40 GiB"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(
    overrides: list[str], hardware: Hardware, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        overrides = [f"parallel.{override}" for override in overrides]
        make_plan(load_config(CONFIGS / "dlcm_2.3b.yaml", overrides), hardware)
    assert "\n" not in str(refused.value)
    assert refused.value.key and refused.value.key in str(refused.value)


def test_layouts_are_ranked_and_the_others_have_reasons() -> None:
    """The large model on 512 devices, with an even vocabulary: an odd one cannot be cut."""
    config = load_config(CONFIGS / "dlcm_2.3b.yaml", ["model.vocab_size=128816"])
    hardware = large(64, device_memory_gib=24.0)
    ranking = rank_layouts(config, hardware)
    steps = [layout.step_seconds for layout in ranking.layouts]
    assert steps == sorted(steps)
    assert all(layout.plan.memory.total <= 24 * 2**30 for layout in ranking.layouts)
    assert {layout.parallel.tensor_parallel_size for layout in ranking.layouts} == {1, 2, 4}
    assert {layout.parallel.pipeline_placement for layout in ranking.layouts} == {
        "linear",
        "folded",
    }
    zero = {layout.parallel.zero_stage for layout in ranking.layouts}
    assert zero == {1, 2, 3}
    assert set(ranking.refused) == {
        "parallel.zero_stage must be 0 or 1 with a pipeline",
        "training.precision bf16 needs ZeRO 1 to keep master weights",
        "model.token_kv_heads is not divisible by the tensor parallel size",
        "parallel.pipeline_parallel_size cuts the model into more chunks than it has units",
        "needs more than --device-memory",
    }
    reasons = " ".join(ranking.refused)
    for word in ("zero_stage", "precision", "kv_heads", "more chunks", "--device-memory"):
        assert word in reasons
    # every pair of sizes, stage, way to recompute, rows and placement was either ranked or refused
    pairs = [(t, p) for t in (1, 2, 4, 8) for p in (2**i for i in range(10)) if t * p <= 512]
    tried = sum(4 * 3 * (1 + (t > 1)) * (1 + (p > 1)) for t, p in pairs)
    assert len(steps) + sum(ranking.refused.values()) == tried


def test_a_ranked_layout_is_planned_alike_on_its_own() -> None:
    config, hardware = load_config(CONFIGS / "dlcm_2.3b.yaml"), large()
    ranking = rank_layouts(config, hardware)
    for layout in ranking.layouts[:: len(ranking.layouts) // 5]:
        alone = make_plan(dataclasses.replace(config, parallel=layout.parallel), hardware)
        assert alone.layout == layout.plan
        assert alone.utilization == layout.utilization
        assert alone.layout_name == layout.description


def test_layouts_are_compared_at_a_stated_speed_where_none_is_given() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml")
    ranking = rank_layouts(config, Hardware(1, 8))
    assert ranking.peak_tflops == 989.0
    assert "at 989 TFLOP/s" in render_ranking(ranking, 3)
    assert len(ranking_to_dict(ranking, 3)["layouts"]) == 3


def test_the_tables_show_stages_and_alternatives() -> None:
    config = load_config(CONFIGS / "dlcm_2.3b.yaml", ["parallel.pipeline_parallel_size=8"])
    plan = make_plan(config, large())
    table, values = render_plan(plan), plan_to_dict(plan)
    assert f"heaviest stage {plan.layout.imbalance:.3f} of the mean" in table
    assert "token_embedding .. encoder.3" in table
    assert "riding along" in table
    assert values["layout"]["step_seconds"] == plan.layout.step_seconds
    assert len(values["layout"]["stages"]) == 8
    assert values["layout"]["stages"][0]["memory_total"] == plan.layout.stages[0].memory.total
    assert json.loads(json.dumps(values)) == json.loads(json.dumps(values, sort_keys=True))


def test_the_command_prints_layouts_or_says_why_there_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large_model = str(CONFIGS / "dlcm_2.3b.yaml")
    machines = ["--nodes", "64", "--gpus-per-node", "8"]
    assert main(["plan", large_model, *machines, "--layouts", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["layouts"]) == 4 <= values["layouts_that_fit"]
    assert main(["plan", large_model, *machines, "--layouts", "4", "--device-memory", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no layout of 512 processes works: ")
    assert error.count("\n") == 1
    links = ["--intra-bandwidth", "450", "--inter-bandwidth", "0"]
    with pytest.raises(SystemExit, match="2"):
        main(["plan", large_model, *machines, *links])
    assert main(["plan", large_model, *machines, "--layouts", "--verify"]) == 2
