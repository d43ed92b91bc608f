"""Decoupled muP: the table of groups, the initial values, and sizes that width leaves alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megadlcm.config import MupConfig, RunConfig, config_from_dict
from megadlcm.engine.optimizer import parameter_groups
from megadlcm.model import DLCM, LanguageModel, build_model
from megadlcm.model.scaling import GROUPS, group_of, initialize_parameters, parameter_table
from megadlcm.ops.cross_entropy import token_cross_entropy
from tests.support.tiny_models import ALIGNS, BOUNDARY_MODES, force_boundaries, pack, tiny_config

MUP = MupConfig(base_width=32, init_std=0.05)
# widths 64 and 160 at base width 32: s_token = 2, s_concept = 5
WIDE: dict[str, Any] = {"d_token": 64, "d_concept": 160, "concept_heads": 8, "concept_kv_heads": 4}
TOKEN, CONCEPT = 1 / 2, 1 / 5
CONCEPT_READERS = ("concept_reader.wk", "concept_reader.wv", "backbone.blocks")
FIXED = ("token_embedding", "lm_head", "null_concept", "gain")


def wide_model(seed: int = 0, **options: Any) -> LanguageModel:
    return build_model(tiny_config(**(WIDE | options)), MUP, seed=seed)


def expected_scale(name: str) -> float:
    """1 / s of the side that a parameter reads from; 1 where width plays no part."""
    if any(part in name for part in FIXED):
        return 1.0
    return CONCEPT if name.startswith(CONCEPT_READERS) else TOKEN


@pytest.mark.parametrize("architecture", ["dlcm", "dense"])
@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("mode", BOUNDARY_MODES)
def test_every_parameter_has_one_rule(mode: str, align: str, architecture: str) -> None:
    """Rate and epsilon follow the fan-in; variance too, where values are drawn."""
    options: dict[str, Any] = {"boundary_mode": mode, "segment_align": align}
    model = wide_model(architecture=architecture, self_attention_qk_norm=True, **options)
    table = parameter_table(model, model.config, MUP)
    assert list(table) == [name for name, _ in model.named_parameters()]
    for name, rule in table.items():
        scale = expected_scale(name)
        assert rule.group in GROUPS
        assert rule.learning_rate_scale == pytest.approx(scale), name
        assert rule.eps_scale == pytest.approx(scale), name
        if "gain" in name or "null_concept" in name or "boundary_detector" in name:
            assert rule.init_std is None and not rule.decays
        elif name.startswith("token_embedding"):
            assert rule.init_std == MUP.embedding_std and not rule.decays
        else:
            assert rule.init_std == pytest.approx(0.05 * math.sqrt(scale)), name
            assert rule.decays
    assert {expected_scale(name) for name in table} >= {1.0, TOKEN}


def test_a_bridge_follows_the_side_that_it_reads_from() -> None:
    """The matrices between the widths, one by one, against their shapes."""
    model = wide_model()
    weights = dict(model.named_parameters())
    bridges = {
        "concept_pool.up_projection.weight": "token",
        "concept_reader.wq.weight": "token",
        "concept_reader.wo.weight": "token",
        "concept_reader.wk.weight": "concept",
        "concept_reader.wv.weight": "concept",
    }
    for name, group in bridges.items():
        assert group_of(name) == group
        assert weights[name].shape[1] == {"token": 64, "concept": 160}[group]
    for name, weight in weights.items():
        if group_of(name) in ("token", "concept") and "w_down" not in name:
            assert weight.shape[1] == {"token": 64, "concept": 160}[group_of(name)], name


def test_the_logits_are_divided_by_the_token_multiplier() -> None:
    model = wide_model()
    states_TD = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = states_TD @ model.lm_head.weight.T / 2.0
    torch.testing.assert_close(model.logits(states_TD), expected)


def test_an_unknown_parameter_is_an_error() -> None:
    """A new module cannot train with rates that nobody chose."""
    with pytest.raises(ValueError, match=r"encoder\.adapter\.weight belongs to no muP group"):
        group_of("encoder.adapter.weight")
    model = wide_model()
    model.encoder.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match=r"encoder\.extra"):
        initialize_parameters(model, model.config, MUP, seed=0)


def test_initial_values_have_the_standard_deviation_of_the_table() -> None:
    """Mean and deviation within five standard errors, for every parameter that is drawn."""
    model = wide_model(vocab_size=2000, segment_align="start_shift")
    table = parameter_table(model, model.config, MUP)
    drawn = 0
    for name, weight in model.named_parameters():
        std = table[name].init_std
        if std is None:
            continue
        drawn += 1
        error = 5 * std / math.sqrt(weight.numel())
        assert abs(float(weight.detach().mean())) < error, name
        assert abs(float(weight.detach().std()) - std) < error / math.sqrt(2), name
    assert drawn > 20
    for name, weight in model.named_parameters():
        if name.endswith("gain"):
            assert bool((weight == 1).all())
    assert not model.concept_pool.null_concept.any()


def test_a_reader_that_starts_silent_is_zero() -> None:
    assert not wide_model(cross_output_zero_init=True).concept_reader.wo.weight.any()
    assert wide_model().concept_reader.wo.weight.any()


@pytest.mark.parametrize("size", [None, 64, 16])
def test_both_projections_of_the_detector_start_as_the_same_rotation(size: int | None) -> None:
    """The identity, or the same orthonormal rows: training begins with the plain cosine."""
    detector = wide_model(boundary_size=size).boundary_detector
    weight = detector.w_q.weight
    assert torch.equal(weight, detector.w_k.weight)
    torch.testing.assert_close(weight @ weight.T, torch.eye(size or 64), rtol=0, atol=1e-5)
    if size == 16:
        assert weight.shape == (16, 64)
        other = wide_model(boundary_size=size, seed=1).boundary_detector.w_q.weight
        assert not torch.allclose(weight, other)
    else:
        assert torch.equal(weight, torch.eye(64))


def test_the_values_of_a_parameter_do_not_depend_on_other_parameters() -> None:
    """More blocks, other modes and another order of construction leave them as they are."""
    base = dict(wide_model().named_parameters())
    variants: list[dict[str, Any]] = [
        {"encoder_layers": 4, "backbone_layers": 1},
        {"boundary_mode": "rule", "segment_align": "start_shift"},
        {"self_attention_qk_norm": True},
    ]
    for options in variants:
        other = dict(wide_model(**options).named_parameters())
        shared = [name for name in base if name in other and "boundary_detector" not in name]
        assert len(shared) > 40 and set(other) != set(base)
        assert all(torch.equal(base[name], other[name]) for name in shared)
    reseeded = dict(wide_model(seed=1).named_parameters())
    assert not torch.equal(base["lm_head.weight"], reseeded["lm_head.weight"])
    twins = [base[f"encoder.blocks.{index}.attention.wq.weight"] for index in (0, 1)]
    assert not torch.equal(*twins)


# coordinate check: a few real optimizer steps at several widths

STACKS = ("encoder", "backbone", "decoder")
WIDTHS = {1: (64, 128, 256, 512), 2: (64, 128, 256), 4: (64, 128, 256)}
SEEDS = (0, 1, 2)
STEPS = 5
VOCAB_SIZE = 32
RATE = 3e-3


def coordinate_run(width: int, concept_ratio: int) -> RunConfig:
    """Two blocks in each stack, heads of 16; the base width is the smallest one."""
    concept = width * concept_ratio
    model = tiny_config(
        vocab_size=VOCAB_SIZE,
        d_token=width,
        d_concept=concept,
        token_heads=width // 16,
        token_kv_heads=width // 32,
        concept_heads=concept // 16,
        concept_kv_heads=concept // 32,
        token_ffn_size=2 * width,
        concept_ffn_size=concept,
        target_tokens_per_concept=4.0,
    )
    return config_from_dict(
        {
            "name": "coordinates",
            "output_dir": "coordinates",
            "model": {key: getattr(model, key) for key in model.__dataclass_fields__},
            "training": {"train_steps": STEPS, "global_batch_size": 1, "micro_batch_size": 1},
            "optimizer": {"learning_rate": RATE},
            "mup": {"base_width": 64},
        }
    )


def measure(model: DLCM, tokens_T: Tensor, cu: Tensor, labels_T: Tensor) -> dict[str, Tensor]:
    """Output of each stack before its norm, what the stack added to it, and the label's logit."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in STACKS:
        stack = getattr(model, name)

        def keep_input(_: object, inputs: tuple[Any, ...], name: str = name) -> None:
            found[f"{name} adds"] = inputs[0]

        def keep_output(_: object, __: object, output: Tensor, name: str = name) -> None:
            found[name] = output

        handles.append(stack.register_forward_pre_hook(keep_input))
        handles.append(stack.layers[-1].register_forward_hook(keep_output))
    with torch.no_grad():
        logits_TV = model(tokens_T, cu).logits_TV
    for handle in handles:
        handle.remove()
    for name in STACKS:
        found[f"{name} adds"] = found[name] - found[f"{name} adds"]
    found["label"] = logits_TV.gather(1, labels_T.unsqueeze(1)).squeeze(1) - logits_TV.mean(1)
    return found


class Coordinates(NamedTuple):
    """Mean absolute sizes after training, the same of the changes, and the drop of the loss."""

    sizes: dict[str, float]
    changes: dict[str, float]
    loss_drop: float


@functools.cache
def coordinates(width: int, concept_ratio: int, seed: int, control: str = "") -> Coordinates:
    """Trains one model on one batch; a control leaves out one part of the scaling."""
    config = coordinate_run(width, concept_ratio)
    model = build_model(config.model, config.mup, seed=seed)
    assert isinstance(model, DLCM)
    # decisions that training cannot move, so that concepts before and after can be compared
    force_boundaries(model, lambda position_T: position_T % 4 == 3)
    generator = torch.Generator().manual_seed(seed)
    documents = list(torch.randint(VOCAB_SIZE, (4, 32), generator=generator))
    tokens_T, cu_seqlens = pack(documents)
    labels_T = (7 * tokens_T + 3) % VOCAB_SIZE
    groups = parameter_groups(model, config)
    if control == "one rate":
        for group in groups:
            group["lr"] = RATE
    if control == "undivided logits":
        model.output_scale = 1.0
    optimizer = torch.optim.AdamW(groups)
    before = measure(model, tokens_T, cu_seqlens, labels_T)
    losses = []
    for _ in range(STEPS):
        output = model(tokens_T, cu_seqlens)
        loss = token_cross_entropy(output.logits_TV, labels_T).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + 0.03 * output.boundary.prob_T.mean()).backward()
        optimizer.step()
    after = measure(model, tokens_T, cu_seqlens, labels_T)
    sizes = {name: float(value.abs().mean()) for name, value in after.items()}
    changes = {name: float((after[name] - before[name]).abs().mean()) for name in after}
    return Coordinates(sizes, changes, losses[0] - losses[-1])


def slope(scales: Sequence[float], values: Sequence[float]) -> float:
    """Exponent e of the fit value ~ scale^e."""
    x = torch.tensor(scales, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def width_slopes(
    concept_ratio: int, control: str = ""
) -> tuple[dict[str, float], dict[str, float]]:
    """Exponents of sizes and of changes over the widths, from means over the seeds."""
    widths = WIDTHS[concept_ratio]
    seeds = SEEDS[:1] if control else SEEDS
    runs = [
        [coordinates(width, concept_ratio, seed, control) for seed in seeds] for width in widths
    ]

    def exponents(tables: list[list[dict[str, float]]]) -> dict[str, float]:
        return {
            name: slope(widths, [sum(table[name] for table in row) for row in tables])
            for name in tables[0][0]
        }

    return (
        exponents([[run.sizes for run in row] for row in runs]),
        exponents([[run.changes for run in row] for row in runs]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("concept_ratio", list(WIDTHS))
def test_training_moves_activations_alike_at_every_width(concept_ratio: int) -> None:
    """Exponents of the streams within 0.2 of zero, and of the label's logit within 0.05.

    What a stack adds to its stream is a small difference with few layers and few steps: 0.3. Its
    exponent is negative because the noise of a finite width fades. Mean absolute logits are no
    measure: at the start they fall as 1 / sqrt(width) under muP, and so does what other tokens
    leave in them.
    """
    sizes, changes = width_slopes(concept_ratio)
    for name in STACKS:
        for exponents in (sizes, changes):
            assert abs(exponents[name]) < 0.2, (name, exponents)
            assert abs(exponents[f"{name} adds"]) < 0.3, (name, exponents)
    assert abs(sizes["label"]) < 0.05 and abs(changes["label"]) < 0.05
    for width in WIDTHS[concept_ratio]:
        assert coordinates(width, concept_ratio, 0).loss_drop > 0.5, "the loss falls at every width"


@pytest.mark.slow
@pytest.mark.parametrize("concept_ratio", list(WIDTHS))
def test_one_rate_for_all_widths_moves_wide_models_too_far(concept_ratio: int) -> None:
    """Negative control: the standard parametrisation's rates on the same initial values."""
    _, changes = width_slopes(concept_ratio, "one rate")
    for name in STACKS:
        assert changes[f"{name} adds"] > 0.8, (name, changes)


@pytest.mark.slow
def test_undivided_logits_grow_with_width() -> None:
    """Negative control of the head."""
    assert width_slopes(2, "undivided logits")[1]["label"] > 0.7


@pytest.mark.slow
def test_the_backbone_has_a_multiplier_of_its_own() -> None:
    """At one token width: a backbone four times as wide moves little more than an equal one.

    Width 64 is the base width, so `one rate` is there the rate of the token multiplier.
    """

    def exponent(control: str) -> float:
        ratios = list(WIDTHS)
        moved = [coordinates(64, ratio, 0, control).changes["backbone adds"] for ratio in ratios]
        return slope(ratios, moved)

    assert abs(exponent("")) < 0.5
    assert exponent("one rate") > 1.2
