"""YAML and overrides become a run exactly, or one line says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadlcm.config import (
    InputError,
    RunConfig,
    config_from_dict,
    config_keys,
    config_to_dict,
    dump_config,
    load_config,
    model_config_from_dict,
)
from tests.support.paths import QUICKSTART

ODD_PIECES = ("!!int ", "!!timestamp ", "! ", "&a ", "*a", r'"\UFFFFFFFF"', r"\x00", "1e9", "null")


def value_at(config: RunConfig, key: str) -> Any:
    value: Any = config_to_dict(config)
    for part in key.split("."):
        value = value[part]
    return value


def test_defaults_yield_to_the_file_and_the_file_to_overrides(run_file: Path) -> None:
    config = load_config(run_file, ["data.seq_len=64", "schedule.warmup_steps=5"])
    assert config.parallel.zero_stage == 1  # default
    assert config.training.global_batch_size == 8  # file
    assert (config.data.seq_len, config.schedule.warmup_steps) == (64, 5)  # overrides


def test_a_file_of_too_many_keys_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    """Reading tens of thousands took half a minute: bounded, and each key is looked up once."""
    for number, problem in ((30_000, "20,000 keys and values"), (9_000, "k0 is not a config key")):
        path = tmp_path / f"{number}.yaml"
        path.write_text("".join(f"k{key}: 1\n" for key in range(number)))
        with pytest.raises(InputError, match=problem):
            load_config(path)
    path = tmp_path / "long.yaml"
    path.write_text("# " + "x" * 5_000_000)
    with pytest.raises(InputError, match="longer than 4 MiB"):
        load_config(path)


def test_a_config_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for endless in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match=r"config .*: no ordinary file; name a YAML file"):
            load_config(endless)


def test_the_last_of_two_overrides_wins(run_file: Path) -> None:
    assert load_config(run_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.eps=1E-9", 1e-9),
        ("optimizer.weight_decay=0", 0.0),
        ("optimizer.betas=[0.8, 0.99]", [0.8, 0.99]),
        ("training.train_steps=1e3", 1000),
        ("training.micro_batch_size=4.0", 4),
        ("name=on", "on"),
        ("name=1:30", "1:30"),
        ("name=007", "007"),
        ("name='null'", "null"),
        ("output_dir=runs/a=b", "runs/a=b"),
        ("logging.tensorboard=false", False),
        ("logging.peak_tflops=989", 989.0),
        ("model.rule_threshold=null", None),
        ("data.tokenizer=", None),
        ("checkpoint.async=false", False),
        ("data.valid=[]", []),
        (
            "data.train=[{path: DIR, weight: 1.5, name: a}, {path: b}]",
            [
                {"path": "DIR", "weight": 1.5, "name": "a"},
                {"path": "b", "weight": 1.0, "name": ""},
            ],
        ),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(
    run_file: Path, override: str, expected: Any
) -> None:
    found = value_at(load_config(run_file, [override]), override.partition("=")[0])
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_tokn=3", "model.d_tokn is not a config key; did you mean model.d_token?"),
        ("trainin.x=1", "trainin is not a config key; did you mean training?"),
        ("model.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("data.train=[{path: a, wieght: 1}]", "data.train[0].wieght is not a config key"),
        ("zzz=1", "zzz is not a config key; a run has name, seed, output_dir"),
        ("training.micro_batch_size=true", "training.micro_batch_size = true, must be an integer"),
        ("training.micro_batch_size=2.5", '= "2.5", must be an integer'),
        ("seed=1:30", 'seed = "1:30", must be an integer'),
        ("seed=1e999999999", "must be an integer"),
        ("optimizer.learning_rate=.nan", "must be a number"),
        ("optimizer.learning_rate=1e999", "must be a number"),
        ("optimizer.betas=[0.9]", "must be a list of 2"),
        ("optimizer.betas=0.9", "must be a list"),
        ("logging.tensorboard=yes", "must be true or false"),
        ("name=true", "name = true, must be text"),
        ("name=null", "name = null, must be text"),
        ("model.boundary_mode=learnd_global", "did you mean learned_global?"),
        ("model.architecture=moe", "must be one of dlcm, dense"),
        ("model=5", 'model = "5", must be a section'),
        ("training={}", "training.global_batch_size is missing, must be an integer"),
        ("seed", "override 'seed' must be key=value"),
        ("=3", "override '=3' must be key=value"),
        ("seed=[", "override seed: YAML that cannot be read"),
        ("name.x=1", "name has no keys below it"),
        ("data.train.0.path=b", "data.train has no keys below it"),
        ("optimizer={eps: 1, eps: 2}", "the key 'eps' is given twice"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_with_its_key(
    run_file: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(run_file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.key in str(caught.value)
    assert bool(caught.value.key) == (override != "=3")  # which has none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold `key: value` lines"),
        ("- a", "must hold `key: value` lines"),
        ("name: [", "YAML that cannot be read in line"),
        ("# note\nname: &a [*a]", "in line 2: tags, anchors and aliases are not supported"),
        ("name: !!timestamp x", "in line 1: tags, anchors and aliases are not supported"),
        ("[" * 3000, "in line 1: more than 20 levels of nesting"),
        ("%YAML 1." + "9" * 5000 + "\n---\nname: a", "YAML that cannot be read"),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("name: a", "output_dir is missing, must be a path"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_token=!!int abc", "override model.d_token: YAML that cannot be read in line 1"),
        ("name=!!timestamp x", "tags, anchors and aliases are not supported"),
        ("name=!!python/tuple [a]", "tags, anchors and aliases are not supported"),
        ("name=&a [*a]", "tags, anchors and aliases are not supported"),
        ("optimizer={<<: *a}", "tags, anchors and aliases are not supported"),
        ("name=" + "[" * 3000 + "]" * 3000, "override name: YAML that cannot be read"),
        ("name=" + "{a: " * 3000 + "}" * 3000, "more than 20 levels of nesting"),
        (r'name="\UFFFFFFFF"', "override name: YAML that cannot be read"),
        (r'name="\ud800"', "name = "),
        (r'output_dir="a\0b"', "output_dir = "),
        (r'name="a\nb"', "must be text on one line"),
        (r'optimizer={"a\nb": 1}', r"optimizer.a\nb is not a config key"),
        ("seed=" + "x" * 9999, 'seed = "xxxx'),
        (f"seed=[{'x, ' * 9999}]", 'seed = ["x", "x"'),
        ("model.boundary_mode=" + "x" * 9999, "must be one of learned_global"),
        ("x" * 9999 + "=1", "is not a config key"),
        ("x" * 9999 + "=[", "YAML that cannot be read"),
        ("name." + "x" * 9999 + "=1", "name has no keys below it"),
        ("x" * 9999, "must be key=value"),
        (f"optimizer={{{'x' * 999}: 1, {'x' * 999}: 2}}", "is given twice"),
    ],
    ids=lambda text: text[:24],
)
def test_what_no_config_needs_ends_in_one_short_line(
    run_file: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(run_file, [override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


@given(
    st.sampled_from(["name", "seed", "model", "data.train", "optimizer.betas"]),
    st.lists(st.sampled_from([*"[]{}:,'\"|>%-?# \n\t.", *ODD_PIECES])),
)
def test_any_text_is_a_value_or_one_short_line(key: str, pieces: list[str]) -> None:
    """Brackets, quotes, tags and escapes in any order never end in another exception."""
    try:
        load_config(QUICKSTART, [f"{key}={''.join(pieces)}"])
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 700


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(binary)


def test_a_run_survives_a_mapping_json_and_a_file(run_file: Path, tmp_path: Path) -> None:
    config = load_config(run_file, ["optimizer.eps=1e-9", "name='true'", "model.boundary_size=16"])
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(saved) == config


@given(st.floats(min_value=1e-300, max_value=1e300, allow_nan=False))
def test_every_learning_rate_is_read_back_exactly(value: float) -> None:
    model = {"vocab_size": 8, "d_token": 4, "token_heads": 2, "token_kv_heads": 2}
    tree = {
        "name": "x",
        "output_dir": "x",
        "model": model | {"architecture": "dense", "token_ffn_size": 8, "decoder_layers": 1},
        "training": {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "optimizer": {"learning_rate": repr(value)},
    }
    assert config_from_dict(tree).optimizer.learning_rate == value


def test_the_data_take_the_seed_of_the_run_unless_they_have_their_own(run_file: Path) -> None:
    assert load_config(run_file).data.seed == 3
    assert load_config(run_file, ["data.seed=0"]).data.seed == 0
    assert load_config(run_file, ["seed=9"]).data.seed == 9


def test_a_model_alone_is_decoded_as_strictly(run_file: Path) -> None:
    model = load_config(run_file).model
    tree = config_to_dict(model)
    assert model_config_from_dict(tree) == model
    with pytest.raises(InputError, match=r"did you mean model\.d_token\?"):
        model_config_from_dict(tree | {"d_tokn": 1})


def test_every_fixed_key_exists() -> None:
    sections = {
        "": "name seed output_dir",
        "model.": "architecture vocab_size d_token d_concept encoder_layers backbone_layers "
        "decoder_layers target_tokens_per_concept boundary_mode segment_align concept_weighting "
        "attention_backend",
        "data.": "train valid seq_len",
        "parallel.": "tensor_parallel_size pipeline_parallel_size zero_stage sequence_parallel "
        "recompute",
        "training.": "train_steps train_tokens global_batch_size micro_batch_size precision",
        "optimizer.": "learning_rate weight_decay",
        "mup.": "base_width",
        "checkpoint.": "interval_steps keep async",
    }
    fixed = {prefix + name for prefix, names in sections.items() for name in names.split()}
    assert fixed <= set(config_keys())


def test_reading_a_config_loads_neither_torch_nor_numpy(run_file: Path) -> None:
    program = (
        "import sys; from megadlcm.config import load_config; load_config(sys.argv[1]); "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program, run_file], check=False).returncode == 0
