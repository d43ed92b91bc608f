"""Every shipped configuration loads, can be planned, and is as large as its table states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megadlcm.commands.main import main
from megadlcm.config import load_config
from megadlcm.model import build_model
from megadlcm.plan.accounting import count_parameters
from tests.support.paths import CONFIGS

FILES = sorted(CONFIGS.glob("*.yaml"))
NAMES = [path.name for path in FILES]
STATED_BILLIONS = {
    "dlcm_87m.yaml": 0.087,
    "dlcm_274m.yaml": 0.273,
    "dlcm_468m.yaml": 0.467,
    "dlcm_834m.yaml": 0.835,
    "dlcm_2.3b.yaml": 2.340,
    "dense_1.3b.yaml": 1.302,
}


def stated_parameters() -> dict[str, int]:
    """Parameters by file name, from the table in configs/README.md."""
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w.]+)\]\([\w.]+\) \| ([\d,]+) \|", text, re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in rows}


def test_the_table_names_every_file_and_no_other() -> None:
    assert set(stated_parameters()) == set(NAMES)
    assert set(NAMES) >= {"quickstart.yaml", *STATED_BILLIONS}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_shipped_config_has_the_stated_parameters(path: Path) -> None:
    config = load_config(path)
    model = build_model(config.model, config.mup, device="meta")
    real = sum(parameter.numel() for parameter in model.parameters())
    assert real == count_parameters(config.model)["total"] == stated_parameters()[path.name]
    if path.name in STATED_BILLIONS:
        assert round(real / 1e9, 3) == STATED_BILLIONS[path.name]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_shipped_config_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path)]) == 0
    assert path.stem in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_shipped_config_writes_to_a_folder_of_its_own_name(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert path.stem in Path(config.output_dir).parts


def test_the_large_files_share_data_and_proportions() -> None:
    configs = [load_config(CONFIGS / name) for name in STATED_BILLIONS]
    assert [source.weight for source in configs[0].data.train] == [50, 25, 15, 10]
    for config in configs:
        assert config.data == configs[0].data
        model = config.model
        assert (model.vocab_size, model.token_head_size) == (128_815, 64)
        if model.architecture == "dlcm":
            assert model.d_concept == 2 * model.d_token
            assert model.token_heads == 2 * model.token_kv_heads
            assert model.concept_heads == 2 * model.concept_kv_heads
            assert model.token_ffn_size == 4 * model.d_token
            assert model.concept_ffn_size == 2 * model.d_concept


def test_batches_and_warm_up_are_those_that_the_readme_states() -> None:
    """From the 274M model up as LLaMA: 4.2M tokens of 2,048 each, 2,000 steps of warm-up."""
    for name in STATED_BILLIONS:
        config = load_config(CONFIGS / name)
        small = name == "dlcm_87m.yaml"
        assert config.data.seq_len == 2048
        assert config.step_tokens == (2**19 if small else 2**22)
        assert config.schedule.warmup_steps == (1000 if small else 2000)
    for path in FILES:
        config = load_config(path)
        assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
        assert config.training.max_grad_norm == 1.0
        last_part = 0.2 if path.stem == "quickstart" else 0.1
        assert (config.schedule.decay_fraction, config.schedule.final_ratio) == (last_part, 0.0)


def test_the_quickstart_can_be_cut_four_ways() -> None:
    model = load_config(CONFIGS / "quickstart.yaml").model
    sizes = (
        model.vocab_size,
        model.d_token,
        model.d_concept,
        model.token_heads,
        model.token_kv_heads,
        model.concept_heads,
        model.concept_kv_heads,
        model.token_ffn_size,
        model.concept_ffn_size,
    )
    assert [size % 4 for size in sizes] == [0] * len(sizes)
    assert model.num_layers >= 8
