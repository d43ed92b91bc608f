"""Documents to inputs and labels, by the definition."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.packing import cut_piece

EOS = 99


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_piece_is_a_stretch_of_the_documents_stream(num_tokens: int) -> None:
    """Every start and stop against inputs [eos, t1..tn] and labels [t1..tn, eos]."""
    text = np.arange(10, 10 + num_tokens)
    inputs, labels = [EOS, *text], [*text, EOS]
    for start in range(num_tokens + 1):
        for stop in range(start + 1, num_tokens + 2):
            piece = cut_piece(lambda a, b: text[a:b], num_tokens, start, stop, EOS)
            assert piece.tokens_T.tolist() == inputs[start:stop]
            assert piece.labels_T.tolist() == labels[start:stop]


def test_a_read_that_comes_short_is_no_batch() -> None:
    """Rather stop than train on what happened to be in memory."""
    with pytest.raises(AssertionError, match="read 0 tokens of 3"):
        cut_piece(lambda a, b: np.empty(0, dtype=np.int64), 3, 0, 4, EOS)
