"""What DLCM and the dense control share: embedding, head, attention back-end, recomputation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import get_args

import torch
from torch import Tensor, nn

from megadlcm.config import ModelConfig
from megadlcm.config.kernels import AttentionBackend
from megadlcm.config.parallel import Recompute
from megadlcm.model.output import ModelOutput
from megadlcm.model.seams import WHOLE, Seams
from megadlcm.model.transformer import Linear, Stack
from megadlcm.ops.attention import choose_backend
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.cross_entropy import VocabularyPart, is_own_token


class Embedding(nn.Embedding):
    """A token embedding without torch's own initialisation (see `scaling`)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.seams: Seams = WHOLE

    def reset_parameters(self) -> None:
        """Leaves the weights to `initialize_parameters`."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks up tokens, (T,) to (T, D); processes that share the vocabulary add their parts."""
        size = self.weight.shape[0]
        if size == self.num_embeddings:
            return super().forward(input)
        # a foreign token is looked up as token 0 and multiplied by 0
        local_T, own_T = is_own_token(input, self.seams.vocabulary_start(size), size)
        found_TD = nn.functional.embedding(local_T, self.weight)
        return self.seams.sum_from_layer(found_TD * own_T.unsqueeze(1))


def attention_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """Finds the attention back-end of a model before it is built; see `choose_backend`."""
    head_sizes = [config.token_head_size]
    # what the dense control says of concepts is not read, and may fit no kernel
    if config.architecture == "dlcm":
        head_sizes.append(config.concept_head_size)
    return choose_backend(config.attention_backend, device, dtype, head_sizes)


class LanguageModel(nn.Module, ABC):
    """A model from packed tokens to logits.

    Args:
        config: shape of the model.
        output_scale: factor of the logits, 1 / width multiplier under muP.
    """

    def __init__(self, config: ModelConfig, output_scale: float) -> None:
        super().__init__()
        self.config = config
        self.output_scale = output_scale
        self.token_embedding = Embedding(config.vocab_size, config.d_token)
        self.lm_head = Linear(config.d_token, config.vocab_size)
        self.seams: Seams = WHOLE

    @property
    @abstractmethod
    def stacks(self) -> list[Stack]:
        """The stacks of blocks, in the order of the computation."""

    @property
    def final_stack(self) -> Stack:
        """The stack below the head."""
        return self.stacks[-1]

    @abstractmethod
    def forward(
        self, tokens_T: Tensor, cu_seqlens: Tensor, sampling: BoundarySampling | None = None
    ) -> ModelOutput:
        """Predicts the next token of each token of packed documents."""

    def logits(self, states_TD: Tensor) -> Tensor:
        """Logits of the decoder's output, scaled for muP; (T, D) to (T, V).

        Of processes that share the vocabulary each holds its own part of V.
        """
        # the narrow side is scaled: T x D numbers instead of T x V
        return self.lm_head(self.seams.copy_to_layer(states_TD * self.output_scale))

    @property
    def vocabulary(self) -> VocabularyPart | None:
        """Puts parts of the vocabulary together; None if this process holds all of it."""
        return None if self.seams is WHOLE else self.seams

    def backend(self) -> AttentionBackend:
        """The attention back-end in use, with `auto` resolved for the weights' device and type."""
        weight = next(self.parameters())
        dtype = weight.dtype
        # what a kernel gets is the type of autocast, not that of the weights
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return attention_backend(self.config, weight.device, dtype)

    def set_recompute(self, mode: str) -> None:
        """Chooses activation recomputation.

        Boundaries are computed outside of every recomputed block and handed in, so that they are
        never drawn twice.

        Args:
            mode: `none`; `block` to keep only the input of each block; `selective` to keep what
                matrix products and attention made.

        Raises:
            ValueError: another mode.
        """
        if mode not in get_args(Recompute):
            *names, last = get_args(Recompute)
            raise ValueError(f"recompute={mode!r} must be {', '.join(names)} or {last}")
        # the stacks read it at each pass: it may change between steps
        for stack in self.stacks:
            stack.recompute = mode
