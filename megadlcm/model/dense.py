"""The dense control: a LLaMA-style transformer on tokens with the interface of DLCM."""

from __future__ import annotations

from torch import Tensor

from megadlcm.config import ModelConfig
from megadlcm.model.dlcm import token_shape
from megadlcm.model.language_model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.model.transformer import Stack
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.packing import packing_from_offsets


class Dense(LanguageModel):
    """All layers of the config at token width, in one stack."""

    def __init__(self, config: ModelConfig, output_scale: float) -> None:
        super().__init__(config, output_scale)
        # all at token width: the control of the same depth
        self.decoder = Stack(token_shape(config, config.num_layers))

    @property
    def stacks(self) -> list[Stack]:
        # a stage that does not hold the blocks has none
        return [self.decoder] if self.decoder is not None else []

    def forward(
        self, tokens_T: Tensor, cu_seqlens: Tensor, sampling: BoundarySampling | None = None
    ) -> ModelOutput:
        """Predicts the next token of each token of packed documents.

        Args:
            tokens_T: token ids, int64 (T,).
            cu_seqlens: offsets of the documents, int32 (S+1,).
            sampling: not used: there is nothing to draw.

        Returns:
            Logits without segmentation.
        """
        packing = packing_from_offsets(cu_seqlens, tokens_T.numel())
        states_TD = self.decoder(self.token_embedding(tokens_T), packing, self.backend())
        return ModelOutput(self.logits(states_TD), packing, vocabulary=self.vocabulary)
