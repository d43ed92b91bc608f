"""Held-out texts with their concept boundaries marked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.reading.shards import Document
from data_pipeline.tokenizer import Tokenizer
from megadlcm.model.units import MicroBatch
from megadlcm.run_folder import files

SAMPLE_TOKENS = 256
_BROKEN_CHARACTER = "\ufffd"


def choose_documents(documents: Sequence[Document], count: int) -> list[Document]:
    """Takes the first documents of each domain in turn, so that every domain is seen."""
    # a small domain would not be seen among the first documents of all
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    chosen: list[Document] = []
    depth = 0
    while len(chosen) < min(count, len(documents)):
        # a round may overshoot; the cut below keeps its first ones
        chosen += [members[depth] for members in by_domain.values() if depth < len(members)]
        depth += 1
    return chosen[:count]


def text_batch(document: Document, eos_id: int, device: torch.device) -> MicroBatch:
    """The beginning of a document as a model reads it."""
    # the end-of-text in front is a token too
    text_tokens = document.tokens_T[: SAMPLE_TOKENS - 1]
    tokens_T = np.concatenate(([eos_id], text_tokens)).astype(np.int64)
    return MicroBatch(
        torch.from_numpy(tokens_T).to(device),
        torch.tensor([0, len(tokens_T)], dtype=torch.int32, device=device),
    )


def marked_text(document: Document, mask: Sequence[bool], tokenizer: Tokenizer) -> str:
    """Marks where concepts begin in the beginning of a document.

    The mark stands before each boundary token (the paper's convention for print-outs), or later
    where a character is split between tokens.

    Args:
        document: the document.
        mask: the decision of each token of its `text_batch`; empty for a model without concepts.
        tokenizer: the run's tokenizer.

    Returns:
        One block of text with a heading.
    """
    tokens = document.tokens_T[: SAMPLE_TOKENS - 1].tolist()
    ratio = f"{len(mask) / sum(mask):.2f} tokens per concept" if mask else "no concepts"
    # the first decision is that of the token in front, which has no text
    body = mark_boundaries(tokens, list(mask[1:]), tokenizer)
    return f"== {document.domain} / {document.id}: {ratio} ==\n{body}\n"


def mark_boundaries(tokens: list[int], mask: list[bool], tokenizer: Tokenizer) -> str:
    """Decodes tokens with a mark before each boundary; an empty mask marks nothing."""
    pieces: list[str] = []
    open_tokens: list[int] = []
    for index, token in enumerate(tokens):
        if mask and mask[index] and open_tokens:
            text = tokenizer.decode(open_tokens)
            if not text.endswith(_BROKEN_CHARACTER):  # else a character goes on in the next token
                pieces.append(text)
                open_tokens = []
        open_tokens.append(token)
    pieces.append(tokenizer.decode(open_tokens))
    return files.BOUNDARY_MARK.join(pieces)
