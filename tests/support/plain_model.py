"""The whole model once more, document by document and token by token, as plain as it can be.

Written from the equations (LLaMA blocks; DLCM Eq. 1-7, 11-14, 16-17) and from no module of the
product: a model that agrees with itself but is another architecture must not agree with this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megadlcm.config import ModelConfig
from megadlcm.model import LanguageModel

BASE_WIDTH = 16  # of tiny_model


class PlainModel:
    """One document at a time, from the weights of a model; rows are lists of vectors."""

    def __init__(self, model: LanguageModel) -> None:
        self.config: ModelConfig = model.config
        self.weights = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        self.offset = buffers.get("boundary_detector.offset", 0.0)
        self.threshold = buffers.get("boundary_detector.threshold", 0.5)

    def matrix(self, name: str, vector: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ vector

    def norm(self, name: str, vector: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * gain."""
        size = (vector * vector).mean() + self.config.norm_eps
        return vector / size.sqrt() * self.weights[f"{name}.gain"]

    def turn(self, head: Tensor, place: int) -> Tensor:
        """Rotates the pair (i, i + H/2) by place * theta^(-2i/H)."""
        pairs = len(head) // 2
        first, second = [], []
        for i in range(pairs):
            angle = place * self.config.rope_theta ** (-2 * i / len(head))
            a, b = head[i], head[i + pairs]
            first.append(a * math.cos(angle) - b * math.sin(angle))
            second.append(a * math.sin(angle) + b * math.cos(angle))
        return torch.stack(first + second)

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """softmax(q k / sqrt(H)) v of one head."""
        scores = torch.stack([query @ key / math.sqrt(len(query)) for key in keys])
        shares = (scores - scores.max()).exp()
        return sum(
            share * value for share, value in zip(shares / shares.sum(), values, strict=True)
        )

    def block(self, name: str, rows: list[Tensor], heads: int, kv_heads: int) -> list[Tensor]:
        """x + attention(norm(x)), then x + W_down (silu(W_gate y) * W_up y), y = norm(x)."""
        size = len(rows[0]) // heads
        normed = [self.norm(f"{name}.attention_norm", row) for row in rows]
        query, key, value = (
            [list(self.matrix(f"{name}.attention.w{letter}", row).split(size)) for row in normed]
            for letter in "qkv"
        )
        for word, parts in (("query", query), ("key", key)):
            for place, row_heads in enumerate(parts):
                for head, vector in enumerate(row_heads):
                    if self.config.self_attention_qk_norm:
                        vector = self.norm(f"{name}.attention.{word}_norm", vector)
                    row_heads[head] = self.turn(vector, place)
        outputs = []
        for place, row in enumerate(rows):
            read = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                keys = [key[u][shared] for u in range(place + 1)]
                values = [value[u][shared] for u in range(place + 1)]
                read.append(self.attend(query[place][head], keys, values))
            row = row + self.matrix(f"{name}.attention.wo", torch.cat(read))
            x = self.norm(f"{name}.feed_forward_norm", row)
            gate = self.matrix(f"{name}.feed_forward.w_gate", x)
            inner = gate / (1 + (-gate).exp()) * self.matrix(f"{name}.feed_forward.w_up", x)
            outputs.append(row + self.matrix(f"{name}.feed_forward.w_down", inner))
        return outputs

    def stack(self, name: str, rows: list[Tensor], layers: int) -> list[Tensor]:
        config = self.config
        heads, kv_heads = (
            (config.concept_heads, config.concept_kv_heads)
            if name == "backbone"
            else (config.token_heads, config.token_kv_heads)
        )
        for layer in range(layers):
            rows = self.block(f"{name}.blocks.{layer}", rows, heads, kv_heads)
        return [self.norm(f"{name}.norm", row) for row in rows]

    def probabilities(self, hidden: list[Tensor]) -> list[Tensor]:
        """p_t = (1 - cos(W_q h_(t-1), W_k h_t) + offset) / 2; p_0 = 1.

        Mode `rule` has no W, and in mode `fixed` p is the decision.
        """
        if self.config.boundary_mode == "fixed":
            ratio = self.config.target_tokens_per_concept
            places = [t // ratio > (t - 1) // ratio for t in range(len(hidden))]
            return [torch.tensor(float(place), dtype=torch.float64) for place in places]
        probs = [torch.ones((), dtype=torch.float64)]
        for before, row in itertools.pairwise(hidden):
            query, key = before, row
            if self.config.boundary_mode != "rule":
                query = self.matrix("boundary_detector.w_q", before)
                key = self.matrix("boundary_detector.w_k", row)
            cosine = query @ key / (query @ query).sqrt() / (key @ key).sqrt()
            probs.append(((1 - cosine + self.offset) / 2).clamp(0, 1))
        return probs

    def pool(self, hidden: list[Tensor], mask: Sequence[bool]) -> tuple[list[Tensor], list[int]]:
        """Concepts, and the newest one that each token sees."""
        concepts: list[Tensor] = []
        newest: list[int] = []
        open_rows: list[Tensor] = []
        for row, is_boundary in zip(hidden, mask, strict=True):
            if self.config.segment_align == "end":
                open_rows.append(row)
            if is_boundary:
                concepts.append(self.concept(open_rows))
                open_rows = []
            if self.config.segment_align == "start_shift":
                open_rows.append(row)
            newest.append(len(concepts) - 1)
        return concepts, newest

    def concept(self, rows: list[Tensor]) -> Tensor:
        if not rows:
            return self.weights["concept_pool.null_concept"]
        return self.matrix("concept_pool.up_projection", sum(rows) / len(rows))

    def smooth(self, concepts: list[Tensor], probs: list[Tensor]) -> list[Tensor]:
        """z~_k = P_k z_k + (1 - P_k) z~_(k-1)."""
        smoothed = concepts[:1]
        for concept, prob in zip(concepts[1:], probs[1:], strict=True):
            weight = prob.clamp(1e-4, 1 - 1e-4)
            smoothed.append(weight * concept + (1 - weight) * smoothed[-1])
        return smoothed

    def placed(self, name: str, head: Tensor, place: int) -> Tensor:
        """A query or key of the concept reader: normalised, then rotated."""
        head = self.norm(f"concept_reader.{name}_norm", head)
        return self.turn(head, place) if self.config.cross_attention_rope else head

    def value(self, head: Tensor) -> Tensor:
        """A value of the concept reader."""
        return head

    def read(self, hidden: list[Tensor], concepts: list[Tensor], newest: list[int]) -> list[Tensor]:
        """W_O softmax(Q K^T / sqrt(H)) V over replicated concepts, or over each concept once."""
        heads, kv_heads = self.config.token_heads, self.config.token_kv_heads
        size = self.config.d_token // heads
        keys, values = [], []
        for place, concept in enumerate(concepts):
            normed = self.norm("concept_reader.concept_norm", concept)
            key = self.matrix("concept_reader.wk", normed).split(size)
            keys.append([self.placed("key", head, place) for head in key])
            value = self.matrix("concept_reader.wv", normed).split(size)
            values.append([self.value(head) for head in value])
        reads = []
        for token, row in enumerate(hidden):
            normed = self.norm("concept_reader.token_norm", row)
            query = self.matrix("concept_reader.wq", normed).split(size)
            once = range(newest[token] + 1)
            seen = newest[: token + 1] if self.config.concept_weighting == "count" else once
            outputs = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                placed = self.placed("query", query[head], newest[token])
                own = [keys[concept][shared] for concept in seen]
                outputs.append(self.attend(placed, own, [values[k][shared] for k in seen]))
            reads.append(self.matrix("concept_reader.wo", torch.cat(outputs)))
        return reads

    def fuse(self, row: Tensor, read: Tensor, prob: Tensor, is_boundary: bool) -> Tensor:
        """H plus what was read; with `ema_ste` times a confidence that is 1 but for its slope."""
        if self.config.boundary_mode == "ema_ste":
            confidence = prob if is_boundary else 1 - prob
            read = read * (1 + confidence - confidence.detach())
        return row + read

    def dlcm(self, rows: list[Tensor], drawn: list[bool] | None) -> tuple[list[Tensor], Tensor]:
        """From embeddings to the decoder's output, and p; `drawn` are decisions of training."""
        config = self.config
        hidden = self.stack("encoder", rows, config.encoder_layers)
        probs = self.probabilities(hidden)
        mask = drawn or [bool(prob >= self.threshold) for prob in probs]
        concepts, newest = self.pool(hidden, mask)
        concepts = self.stack("backbone", concepts, config.backbone_layers)
        if config.smoothing == "ema" and config.boundary_mode != "fixed":
            weights = [prob for prob, is_boundary in zip(probs, mask, strict=True) if is_boundary]
            live = config.boundary_mode == "ema_ste"
            concepts = self.smooth(concepts, weights if live else [p.detach() for p in weights])
        reads = self.read(hidden, concepts, newest)
        fused = [self.fuse(*parts) for parts in zip(hidden, reads, probs, mask, strict=True)]
        return self.stack("decoder", fused, config.decoder_layers), torch.stack(probs)

    def logits(self, row: Tensor) -> Tensor:
        """W h / s, s = d_token / base width."""
        return self.matrix("lm_head", row) * BASE_WIDTH / self.config.d_token

    def forward(
        self, tokens_T: Tensor, drawn: list[bool] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (T, V) of one document and, of DLCM, its boundary probabilities."""
        rows = [self.weights["token_embedding.weight"][int(token)] for token in tokens_T]
        prob_T = None
        if self.config.architecture == "dlcm":
            rows, prob_T = self.dlcm(rows, drawn)
        else:
            rows = self.stack("decoder", rows, self.config.num_layers)
        return torch.stack([self.logits(row) for row in rows]), prob_T
