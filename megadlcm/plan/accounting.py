"""Parameters and FLOPs per token by formula, so that a login node can plan a run.

Parts carry the names of the model's modules; a test compares every part with the real model.

Letters: D d_token, C d_concept, F inner width of a feed-forward layer, K width of the keys,
L sequence length, R tokens per concept, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from megadlcm.config.model import ModelConfig

TRAINING_PASSES = 3
"""Forward once, backward twice; work that is repeated by recomputation does not count."""
_FFN_MULTIPLE = 256


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part; there is no bias anywhere.

    A block holds 2 D^2 + 2 D K (attention), 3 D F (SwiGLU) and 2 D (norms); a stack ends in a norm.

    Args:
        config: shape of the model.

    Returns:
        Parameters by part, and their `total`.
    """
    d, c = config.d_token, config.d_concept
    counts = {"token_embedding": config.vocab_size * d}
    if config.architecture == "dense":
        counts["decoder"] = _stack_parameters(config, config.num_layers)
    else:
        kv = config.token_kv_heads * config.token_head_size
        counts["encoder"] = _stack_parameters(config, config.encoder_layers)
        counts["boundary_detector"] = _detector_matrices(config)
        # what a document's first tokens see before any concept is complete
        null_concept = c if config.segment_align == "start_shift" else 0
        counts["concept_pool"] = c * d + null_concept
        counts["backbone"] = _backbone_parameters(config)
        # of tokens and concepts, and of one query and one key head, which all heads share
        norms = d + c + 2 * config.token_head_size
        counts["concept_reader"] = 2 * d * d + 2 * c * kv + norms
        counts["decoder"] = _stack_parameters(config, config.decoder_layers)
    counts["lm_head"] = config.vocab_size * d
    return counts | {"total": sum(counts.values())}


def matmul_parameters_per_token(
    config: ModelConfig, tokens_per_concept: float | None = None
) -> dict[str, float]:
    """Counts the matrix elements that meet one token; what runs on concepts counts 1 / R.

    Args:
        config: shape of the model.
        tokens_per_concept: realised R; None means the target. The dense model has none.

    Returns:
        Matrix elements by part, and their `total`.
    """
    # the dense model reads no ratio: nothing of it runs on concepts
    ratio = tokens_per_concept or config.target_tokens_per_concept
    d, c = config.d_token, config.d_concept
    block = _block_matrices(
        d, config.token_kv_heads * config.token_head_size, config.token_ffn_size
    )
    parts: dict[str, float] = {}
    if config.architecture == "dense":
        parts["decoder"] = config.num_layers * block
    else:
        kv = config.token_kv_heads * config.token_head_size
        parts["encoder"] = config.encoder_layers * block
        parts["boundary_detector"] = _detector_matrices(config)
        parts["concept_pool"] = c * d / ratio
        parts["backbone"] = config.backbone_layers * _concept_block_matrices(config) / ratio
        # queries and the output run on tokens, keys and values on concepts
        parts["concept_reader"] = 2 * d * d + 2 * c * kv / ratio
        parts["decoder"] = config.decoder_layers * block
    parts["lm_head"] = config.vocab_size * d
    return parts | {"total": sum(parts.values())}


def flops_per_token(
    config: ModelConfig, seq_len: int, tokens_per_concept: float | None = None
) -> dict[str, float]:
    """Counts the forward FLOPs of one token: two per matrix element, and the attention maps.

    A causal map over L rows costs 4 D L / 2 per row. The concept reader is counted over
    replicated concepts (L keys), which is what the fast kernels compute; the backbone has L / R
    rows of L / R keys. Norms, rotations and the loss are left out. Backward costs twice as much.

    Args:
        config: shape of the model.
        seq_len: tokens that attend to each other; packed documents are shorter and cost less.
        tokens_per_concept: realised R; None means the target. The dense model has none.

    Returns:
        FLOPs by part, and their `total`.
    """
    ratio = tokens_per_concept or config.target_tokens_per_concept
    matrices = matmul_parameters_per_token(config, tokens_per_concept)
    parts = {name: 2.0 * count for name, count in matrices.items() if name != "total"}
    token_map = 2.0 * seq_len * config.d_token
    if config.architecture == "dense":
        parts["decoder"] += config.num_layers * token_map
    else:
        # M rows of M keys: cheaper by R in both, of which `parts` gets the rows below
        concept_map = 2.0 * (seq_len / ratio) * config.d_concept
        parts["encoder"] += config.encoder_layers * token_map
        parts["backbone"] += config.backbone_layers * concept_map / ratio
        parts["concept_reader"] += token_map
        parts["decoder"] += config.decoder_layers * token_map
    return parts | {"total": sum(parts.values())}


def dense_control(config: ModelConfig) -> ModelConfig:
    """The dense model that a DLCM is compared with, in the proportions of the paper's Table 3.

    As many layers, all of token width; as many key-value heads as heads; F = 8/3 D in multiples
    of 256.

    Args:
        config: shape of the model.

    Returns:
        Shape of its control.
    """
    # at least one, as a narrow model would be rounded to none
    multiples = max(round(8 * config.d_token / 3 / _FFN_MULTIPLE), 1)
    return dataclasses.replace(
        config,
        architecture="dense",
        token_kv_heads=config.token_heads,
        token_ffn_size=multiples * _FFN_MULTIPLE,
    )


def _stack_parameters(config: ModelConfig, num_layers: int) -> int:
    d, head_size = config.d_token, config.token_head_size
    block = _block_matrices(d, config.token_kv_heads * head_size, config.token_ffn_size)
    return num_layers * (block + _block_gains(config, d, head_size)) + d


def _backbone_parameters(config: ModelConfig) -> int:
    gains = _block_gains(config, config.d_concept, config.concept_head_size)
    return config.backbone_layers * (_concept_block_matrices(config) + gains) + config.d_concept


def _block_gains(config: ModelConfig, width: int, head_size: int) -> int:
    return 2 * width + (2 * head_size if config.self_attention_qk_norm else 0)


def _concept_block_matrices(config: ModelConfig) -> int:
    kv = config.concept_kv_heads * config.concept_head_size
    return _block_matrices(config.d_concept, kv, config.concept_ffn_size)


def _block_matrices(width: int, kv_width: int, ffn_size: int) -> int:
    return 2 * width * width + 2 * width * kv_width + 3 * width * ffn_size


def _detector_matrices(config: ModelConfig) -> int:
    if not config.boundary.is_learned:
        return 0
    return 2 * (config.boundary_size or config.d_token) * config.d_token
