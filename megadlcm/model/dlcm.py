"""The Dynamic Large Concept Model: DLCM.forward is the paper's four equations, top to bottom.

Letters: T tokens, S documents, M concepts, D d_token, C d_concept, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from megadlcm.config import ModelConfig
from megadlcm.model.boundary_detector import BoundaryDetector, BoundaryOutput
from megadlcm.model.chunking import ConceptPool, ConceptReader
from megadlcm.model.language_model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.model.transformer import Stack, StackShape
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.packing import Packing, packing_from_offsets
from megadlcm.ops.segments import concept_layout


def token_shape(config: ModelConfig, num_layers: int) -> StackShape:
    """Sizes of a stack that runs on tokens."""
    return StackShape(
        num_layers,
        config.d_token,
        config.token_heads,
        config.token_kv_heads,
        config.token_ffn_size,
        config.norm_eps,
        config.rope_theta,
        config.self_attention_qk_norm,
    )


def concept_shape(config: ModelConfig) -> StackShape:
    """Sizes of the backbone, which runs on concepts."""
    return StackShape(
        config.backbone_layers,
        config.d_concept,
        config.concept_heads,
        config.concept_kv_heads,
        config.concept_ffn_size,
        config.norm_eps,
        config.rope_theta,
        config.self_attention_qk_norm,
    )


class DLCM(LanguageModel):
    """Token encoder, segmentation, concept backbone, token decoder."""

    def __init__(self, config: ModelConfig, output_scale: float) -> None:
        super().__init__(config, output_scale)
        self.encoder = Stack(token_shape(config, config.encoder_layers))
        self.boundary_detector = BoundaryDetector(config)
        self.concept_pool = ConceptPool(config)
        self.backbone = Stack(concept_shape(config))
        self.concept_reader = ConceptReader(config)
        self.decoder = Stack(token_shape(config, config.decoder_layers))

    @property
    def stacks(self) -> list[Stack]:
        """The stacks of blocks that are here, in the order of the computation."""
        stacks: list[Stack | None] = [self.encoder, self.backbone, self.decoder]
        return [stack for stack in stacks if stack is not None]

    def forward(
        self, tokens_T: Tensor, cu_seqlens: Tensor, sampling: BoundarySampling | None = None
    ) -> ModelOutput:
        """Predicts the next token of each token of packed documents.

        Args:
            tokens_T: token ids, int64 (T,).
            cu_seqlens: offsets of the documents, int32 (S+1,).
            sampling: names the random draws of training mode; by default seed 0, step 0 and the
                position inside the document: a document is segmented alike alone and packed.

        Returns:
            Logits and segmentation.
        """
        packing = packing_from_offsets(cu_seqlens, tokens_T.numel())
        backend = self.backend()
        hidden_TD, boundary = self._encode(tokens_T, packing, sampling)  # Eq. 1, 5-6
        layout = concept_layout(boundary.mask_T, packing, self.config.segment_align)
        concept_MC = self.concept_pool(hidden_TD, layout)  # Eq. 2, 7
        concept_MC = self.backbone(concept_MC, layout.packing, backend)  # Eq. 3
        fused_TD = self.concept_reader(  # Eq. 11-14
            hidden_TD, concept_MC, boundary, packing, layout, backend
        )
        logits_TV = self.logits(self.decoder(fused_TD, packing, backend))  # Eq. 4
        return ModelOutput(logits_TV, packing, boundary, layout, self.vocabulary)

    def boundaries(
        self, tokens_T: Tensor, cu_seqlens: Tensor, sampling: BoundarySampling | None = None
    ) -> BoundaryOutput:
        """Segments packed documents without predicting anything (encoder and detector only).

        Args:
            tokens_T: token ids, int64 (T,).
            cu_seqlens: offsets of the documents, int32 (S+1,).
            sampling: as in `forward`, which takes the same decisions.

        Returns:
            Scores and decisions.
        """
        packing = packing_from_offsets(cu_seqlens, tokens_T.numel())
        return self._encode(tokens_T, packing, sampling)[1]

    def _encode(
        self, tokens_T: Tensor, packing: Packing, sampling: BoundarySampling | None
    ) -> tuple[Tensor, BoundaryOutput]:
        # by place: the same document draws the same boundaries wherever it is packed
        sampling = sampling or BoundarySampling(seed=0, step=0, token_index_T=packing.position)
        hidden_TD = self.encoder(self.token_embedding(tokens_T), packing, self.backend())
        return hidden_TD, self.boundary_detector(hidden_TD, packing, sampling)
