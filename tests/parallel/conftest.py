"""A small run as a YAML file, which the tests of this folder change by overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

RUN = """\
name: small
seed: 3
output_dir: runs/small
model:
  vocab_size: 512
  d_token: 32
  d_concept: 64
  encoder_layers: 1
  backbone_layers: 2
  decoder_layers: 1
  token_heads: 4
  token_kv_heads: 2
  concept_heads: 4
  concept_kv_heads: 2
  token_ffn_size: 64
  concept_ffn_size: 128
data:
  train: [{path: shards/web, weight: 2, name: web}]
  seq_len: 128
training:
  train_steps: 10
  global_batch_size: 8
  micro_batch_size: 2
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path
