"""ModelConfig: what the network is. Stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.errors import InputError
from megadlcm.config.boundary_modes import (
    BOUNDARY_MODES,
    NO_BOUNDARIES,
    BoundaryMode,
    BoundaryTraits,
)
from megadlcm.config.kernels import AttentionBackend
from megadlcm.config.rules import require_at_least, require_choice, require_positive

Architecture = Literal["dlcm", "dense"]
SegmentAlign = Literal["end", "start_shift"]
ConceptWeighting = Literal["count", "uniform"]
Smoothing = Literal["ema", "none"]

_CHOICES = {
    "architecture": Architecture,
    "boundary_mode": BoundaryMode,
    "segment_align": SegmentAlign,
    "concept_weighting": ConceptWeighting,
    "attention_backend": AttentionBackend,
    "smoothing": Smoothing,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Widths, layers and heads, and how tokens become concepts.

    The dense control has encoder_layers + backbone_layers + decoder_layers layers of token width;
    it reads none of the fields about concepts and boundaries.
    """

    architecture: Architecture = "dlcm"
    """`dlcm`, or `dense` for the control of token width."""

    vocab_size: int
    """Rows of the embedding and of the head; at least the tokenizer's, may be larger."""

    d_token: int
    """Width of encoder and decoder."""

    d_concept: int = 0
    """Width of the backbone; the paper's is 2 * d_token. Needed by `dlcm`."""

    encoder_layers: int = 0
    """Blocks on tokens before the segmentation."""

    backbone_layers: int = 0
    """Blocks on concepts."""

    decoder_layers: int = 0
    """Blocks on tokens after the concepts were read."""

    token_heads: int
    """Query heads of encoder, decoder and concept reader."""

    token_kv_heads: int
    """Key-value heads of encoder, decoder and concept reader."""

    concept_heads: int = 0
    """Query heads of the backbone. Needed by `dlcm`."""

    concept_kv_heads: int = 0
    """Key-value heads of the backbone. Needed by `dlcm`."""

    token_ffn_size: int
    """Inner width of the feed-forward layers of encoder and decoder."""

    concept_ffn_size: int = 0
    """Inner width of the feed-forward layers of the backbone. Needed by `dlcm`."""

    target_tokens_per_concept: float = 4.0
    """The paper's R: how many tokens a concept should hold on average, > 1."""

    boundary_mode: BoundaryMode = "learned_global"
    """Who decides where a concept ends, and over what the ratio is controlled."""

    segment_align: SegmentAlign = "end"
    """Whether a boundary token closes its segment, or opens one that is seen a segment later."""

    concept_weighting: ConceptWeighting = "count"
    """Whether a concept weighs in attention as often as its tokens, or once."""

    attention_backend: AttentionBackend = "auto"
    """Implementation of attention; `auto` takes the fastest that the machine has."""

    sharpening: float = 6.0
    """How far the training draw is pushed towards the threshold, >= 1 (1 = the plain draw)."""

    balanced_draw: bool = False
    """Whether the draw makes as many boundaries as p >= 0.5 would, in modes that draw: tokens on
    the side that flips more often flip less."""

    smoothing: Smoothing = "ema"
    """Moving average over concepts by boundary probability, or none."""

    cross_attention_rope: bool = True
    """Rotary positions (place of the concept) when tokens read concepts."""

    self_attention_qk_norm: bool = False
    """RMSNorm on queries and keys of every self-attention; the concept reader always has it."""

    ratio_loss_detach_hidden: bool = False
    """Whether the ratio loss trains the detector only and not the encoder below it."""

    max_segment_tokens: int = 0
    """Longest segment, >= 2, closed by a forced boundary; 0 means no limit."""

    rule_threshold: float | None = None
    """Threshold of mode `rule`; None tracks the quantile that gives the target ratio."""

    track_threshold: bool = True
    """Whether evaluation and decoding of learned modes threshold at the tracked quantile that gives
    the target ratio; false is the paper's 0.5."""

    boundary_size: int | None = None
    """Width in which neighbours are compared; None means d_token."""

    cross_output_zero_init: bool = False
    """Whether training starts with a concept reader that adds nothing."""

    boundary_calibration: bool = True
    """Whether the detector's offset is set once, from the first batch, to give the ratio."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""

    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        """Checks choices, ranges and that heads divide widths; raises InputError."""
        for key, choices in _CHOICES.items():
            require_choice("model", self, key, get_args(choices))
        require_at_least("model", self, 1, "vocab_size", "token_ffn_size", "boundary_size")
        require_at_least("model", self, 1, "sharpening")
        require_positive("model", self, "rope_theta", "norm_eps")
        self._check_heads("d_token", "token_heads", "token_kv_heads")
        # the dense control reads only what it has; its other fields may stay at their defaults
        if self.architecture == "dlcm":
            require_at_least("model", self, 1, *_LAYER_KEYS, "concept_ffn_size")
            self._check_heads("d_concept", "concept_heads", "concept_kv_heads")
        else:
            require_at_least("model", self, 0, *_LAYER_KEYS)
            if self.num_layers < 1:
                raise InputError(
                    "model.encoder_layers + backbone_layers + decoder_layers = 0, must be >= 1; "
                    "give the dense model a layer",
                    key="model.decoder_layers",
                )
        # the search for the best stages grows with their fourth power
        if self.num_layers > _MAX_LAYERS:
            raise InputError(
                f"model.backbone_layers + encoder_layers + decoder_layers = {self.num_layers}, "
                f"must be <= {_MAX_LAYERS}; give the model fewer layers",
                key="model.backbone_layers",
            )
        self._check_segments()

    @property
    def num_layers(self) -> int:
        """Blocks of all stacks together."""
        return self.encoder_layers + self.backbone_layers + self.decoder_layers

    @property
    def boundary(self) -> BoundaryTraits:
        """Traits of the boundary mode; those of no boundaries for the dense control."""
        return BOUNDARY_MODES[self.boundary_mode] if self.architecture == "dlcm" else NO_BOUNDARIES

    @property
    def calibrates(self) -> bool:
        """Whether a fresh run sets the offset of its boundary detector from the first batch."""
        return self.boundary.is_learned and self.boundary_calibration

    @property
    def tracks_threshold(self) -> bool:
        """Whether the threshold of the boundary detector moves with each step."""
        if self.boundary.decides_by != "score":
            return False
        return self.track_threshold if self.boundary.is_learned else self.rule_threshold is None

    @property
    def still_threshold(self) -> float:
        """Threshold on p before the first step, and ever where it is not tracked."""
        given = None if self.boundary.is_learned else self.rule_threshold
        return 0.5 if given is None else given

    @property
    def balances_draw(self) -> bool:
        """Whether the detector keeps how far its draw leans to one side."""
        return self.boundary.is_sampled and self.balanced_draw

    @property
    def smooths(self) -> bool:
        """Whether concepts are averaged by the probability of their boundary."""
        return self.smoothing != "none" and self.boundary.decides_by == "score"

    @property
    def token_head_size(self) -> int:
        """Width of one token head."""
        return self.d_token // self.token_heads

    @property
    def concept_head_size(self) -> int:
        """Width of one concept head."""
        return self.d_concept // self.concept_heads

    def _check_heads(self, width_key: str, heads_key: str, kv_heads_key: str) -> None:
        require_at_least("model", self, 1, width_key, heads_key, kv_heads_key)
        width, heads = getattr(self, width_key), getattr(self, heads_key)
        kv_heads = getattr(self, kv_heads_key)
        # rotary positions turn pairs of numbers
        if width % heads or (width // heads) % 2:
            raise InputError(
                f"model.{width_key} = {width} over model.{heads_key} = {heads} gives a head size "
                f"of {width / heads:g}, must be an even integer (rotary pairs); change one",
                key=f"model.{width_key}",
            )
        if heads % kv_heads:
            raise InputError(
                f"model.{heads_key} = {heads} is not a multiple of model.{kv_heads_key} = "
                f"{kv_heads}; each key-value head must serve as many query heads",
                key=f"model.{heads_key}",
            )

    def _check_segments(self) -> None:
        ratio = self.target_tokens_per_concept
        # at 1 the ratio loss divides by R - 1 = 0
        if not (math.isfinite(ratio) and ratio > 1):
            raise InputError(
                f"model.target_tokens_per_concept = {ratio}, must be > 1; "
                "for a concept per token train architecture: dense",
                key="model.target_tokens_per_concept",
            )
        if self.max_segment_tokens != 0 and self.max_segment_tokens < 2:
            raise InputError(
                f"model.max_segment_tokens = {self.max_segment_tokens}, must be >= 2, or 0 for no "
                "limit; choose one",
                key="model.max_segment_tokens",
            )
        # the controller would push F below what the forced boundaries alone give
        if 0 < self.max_segment_tokens < ratio:
            raise InputError(
                f"model.max_segment_tokens = {self.max_segment_tokens}, must be >= "
                f"model.target_tokens_per_concept = {ratio}: no segment could reach the target; "
                "raise one or lower the other",
                key="model.max_segment_tokens",
            )
        threshold = self.rule_threshold
        if threshold is not None and not 0.0 < threshold < 1.0:
            raise InputError(
                f"model.rule_threshold = {threshold}, must be between 0 and 1; it is compared with "
                "a probability (null tracks the quantile)",
                key="model.rule_threshold",
            )


_MAX_LAYERS = 256
_LAYER_KEYS = ("encoder_layers", "backbone_layers", "decoder_layers")
