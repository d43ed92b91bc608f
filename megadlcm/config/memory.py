"""Memory of one process by formula, so that a login node can see whether a layout fits.

Letters: T tokens of a micro-batch, M its concepts, D width, K width of the keys, F inner width of
a feed-forward layer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megadlcm.config.accounting import count_parameters
from megadlcm.config.model import ModelConfig
from megadlcm.config.run import RunConfig

_FP32 = 4
_MOMENTS = {"adamw": 2, "sgd": 0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by use."""

    parameters: float
    """Weights in the precision of the arithmetic."""
    gradients: float
    """Sums of gradients, fp32."""
    optimizer: float
    """fp32 master weights and the moments of AdamW."""
    activations: float
    """What forward keeps for backward, at the target number of concepts."""
    activations_worst: float
    """The same if every token were a concept."""

    @property
    def total(self) -> float:
        """Bytes at the target number of concepts."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    @property
    def total_worst(self) -> float:
        """Bytes if every token were a concept."""
        return self.total - self.activations + self.activations_worst


def estimate_memory(config: RunConfig, data_parallel_size: int) -> MemoryEstimate:
    """Estimates what one process of a data-parallel run holds.

    With N parameters of w bytes on n replicas: weights w N, gradients 4 N, master weights 4 N
    (none at stage 0, which trains the weights themselves) and moments 8 N. ZeRO divides optimizer
    (stage 1), gradients (2) and weights (3) by n. Not counted: buckets of communication,
    fragmentation, the CUDA context.

    Args:
        config: the run.
        data_parallel_size: replicas.

    Returns:
        Bytes by use.
    """
    stage = config.parallel.zero_stage
    num_parameters = count_parameters(config.model)["total"]

    def held(num_bytes: float, shared_from: int) -> float:
        shared = stage >= shared_from
        return num_parameters * num_bytes / (data_parallel_size if shared else 1)

    master = _FP32 if stage >= 1 else 0
    moments = _MOMENTS[config.optimizer.name] * _FP32
    tokens = config.training.micro_batch_size * config.data.seq_len
    ratio = config.model.target_tokens_per_concept
    return MemoryEstimate(
        parameters=held(_element_size(config), 3),
        gradients=held(_FP32, 2),
        optimizer=held(master + moments, 1),
        activations=activation_bytes(config, tokens, tokens / ratio),
        activations_worst=activation_bytes(config, tokens, tokens),
    )


def activation_bytes(config: RunConfig, num_tokens: float, num_concepts: float) -> float:
    """Estimates what the forward pass of one micro-batch keeps for its backward pass.

    A block keeps 8 D + 2 K + 4 F elements a row: for each norm its input, the scaled input and its
    output, the queries and the output of attention (D each), keys and values (K), and gate,
    silu(gate), up and their product (F). A fused norm saves one D. With recomputation it keeps its
    input, and one block at a time the rest. The head keeps w V a token of logits and 8 V of the
    loss in fp32. Attention maps are not counted: the fused kernels keep none.

    Args:
        config: the run.
        num_tokens: tokens of the micro-batch, T.
        num_concepts: its concepts, M; not read for the dense model.

    Returns:
        Bytes.
    """
    model, size = config.model, _element_size(config)
    recompute = config.parallel.recompute == "block"
    kv = model.token_kv_heads * model.token_head_size
    token_block = num_tokens * _block_elements(model, model.d_token, kv, model.token_ffn_size)
    token_input = num_tokens * model.d_token
    head = num_tokens * model.vocab_size * (size + 2 * _FP32)
    if model.architecture == "dense":
        blocks = _stack_elements(model.num_layers, token_block, token_input, recompute)
        return size * (blocks + (token_block if recompute else 0)) + head
    kv_concept = model.concept_kv_heads * model.concept_head_size
    concept_block = num_concepts * _block_elements(
        model, model.d_concept, kv_concept, model.concept_ffn_size
    )
    concept_input = num_concepts * model.d_concept
    num_token_blocks = model.encoder_layers + model.decoder_layers
    blocks = _stack_elements(num_token_blocks, token_block, token_input, recompute)
    blocks += _stack_elements(model.backbone_layers, concept_block, concept_input, recompute)
    working = max(token_block, concept_block) if recompute else 0
    bridge = _bridge_bytes(model, size, num_tokens, num_concepts)
    return size * (blocks + working) + bridge + head


def _stack_elements(num_layers: int, block: float, block_input: float, recompute: bool) -> float:
    return num_layers * (block_input if recompute else block) + 3 * block_input


def _block_elements(model: ModelConfig, width: int, kv_width: int, ffn_size: int) -> int:
    qk_norm = 2 * (width + kv_width) if model.self_attention_qk_norm else 0
    return 8 * width + 2 * kv_width + 4 * ffn_size + qk_norm


def _bridge_bytes(model: ModelConfig, size: int, num_tokens: float, num_concepts: float) -> float:
    """Detector (fp32), concept pool and concept reader."""
    kv = model.token_kv_heads * model.token_head_size
    detector = num_tokens * (model.d_token + 4 * (model.boundary_size or model.d_token)) * _FP32
    reader = num_tokens * 7 * model.d_token + num_concepts * (3 * model.d_concept + 6 * kv)
    pool = num_concepts * (model.d_token + model.d_concept)
    return detector + size * (reader + pool)


def _element_size(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else _FP32
