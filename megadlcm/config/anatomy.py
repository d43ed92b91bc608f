"""The units that a model is made of, in the order of the computation. Stdlib only.

A unit is the smallest thing that a pipeline stage can hold. Those who run units (`model.units`) and
those who plan where they lie and what they cost (`plan`, without torch) mean the same ones.

| kind              | modules                                       | reads -> leaves      |
|-------------------|-----------------------------------------------|----------------------|
| `TOKEN_EMBEDDING` | token embedding                               | ids -> tokens        |
| `ENCODER`         | a block                                       | tokens -> tokens     |
| `SEGMENTATION`    | norm of the encoder, boundary detector, pool  | tokens -> concepts   |
| `BACKBONE`        | a block                                       | concepts -> concepts |
| `CONCEPT_READER`  | norm of the backbone, concept reader          | concepts -> tokens   |
| `DECODER`         | a block                                       | tokens -> tokens     |
| `LM_HEAD`         | norm of the decoder, head                     | tokens -> logits     |

The dense control has `TOKEN_EMBEDDING`, `DECODER` and `LM_HEAD`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from megadlcm.config.model import ModelConfig


class Stream(Enum):
    """What each row of a tensor of states stands for."""

    # rows of concepts are fewer by the realised ratio, which differs from batch to batch

    TOKENS = "tokens"
    CONCEPTS = "concepts"


class UnitKind(Enum):
    """What a unit does."""

    TOKEN_EMBEDDING = ("token_embedding", Stream.TOKENS, False)
    ENCODER = ("encoder", Stream.TOKENS, True)
    SEGMENTATION = ("segmentation", Stream.CONCEPTS, False)
    BACKBONE = ("backbone", Stream.CONCEPTS, True)
    CONCEPT_READER = ("concept_reader", Stream.TOKENS, False)
    DECODER = ("decoder", Stream.TOKENS, True)
    LM_HEAD = ("lm_head", Stream.TOKENS, False)

    def __init__(self, label: str, stream: Stream, is_block: bool) -> None:
        self.label = label
        """How it is printed; for blocks also the model's attribute that holds their stack."""
        self.stream = stream
        """Rows that it leaves; rows that a block reads as well."""
        self.is_block = is_block
        """Whether it is one of a stack of equal blocks."""


@dataclass(frozen=True)
class UnitId:
    """One unit of a model."""

    kind: UnitKind
    """What it does."""
    index: int | None = None
    """Place in its stack; None for what exists once."""

    @property
    def name(self) -> str:
        """`token_embedding`, `encoder.0`, ..., `lm_head`."""
        return self.kind.label if self.index is None else f"{self.kind.label}.{self.index}"


def unit_ids(model: ModelConfig) -> list[UnitId]:
    """Lists the units of a model in the order of the computation."""
    order: Iterable[UnitKind]
    if model.architecture == "dense":
        layers = {UnitKind.DECODER: model.num_layers}
        order = (UnitKind.TOKEN_EMBEDDING, UnitKind.DECODER, UnitKind.LM_HEAD)
    else:
        layers = {
            UnitKind.ENCODER: model.encoder_layers,
            UnitKind.BACKBONE: model.backbone_layers,
            UnitKind.DECODER: model.decoder_layers,
        }
        order = UnitKind  # declared in the order of the computation
    units: list[UnitId] = []
    for kind in order:
        units += [UnitId(kind, i) for i in range(layers[kind])] if kind.is_block else [UnitId(kind)]
    return units
