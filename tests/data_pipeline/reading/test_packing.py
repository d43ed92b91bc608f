"""Documents to inputs and labels, by the definition."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.reading.packing import Window, make_sample, pack_windows

EOS = 99
DTYPE = np.dtype("<u2")
STORED_EOS = np.array([EOS], DTYPE).tobytes()


def window_of(number: int, num_tokens: int, pieces: list[tuple[int, int]]) -> Window:
    """Returns a window of stretches of one document of tokens 10, 11, ..."""
    text = np.arange(10, 10 + num_tokens, dtype=DTYPE)
    window = Window(number, "source", 0, DTYPE)
    for start, stop in pieces:
        opens, closes = start == 0, stop == num_tokens + 1
        stored = text[start - 1 + opens : stop - closes].tobytes()
        window.add(stored, opens, closes, STORED_EOS)
        window.document_ids.append("d")
    return window


@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_a_piece_is_a_stretch_of_the_documents_stream(num_tokens: int) -> None:
    """Every start and stop against inputs [eos, t1..tn] and labels [t1..tn, eos]."""
    text = list(range(10, 10 + num_tokens))
    inputs, labels = [EOS, *text], [*text, EOS]
    for start in range(num_tokens + 1):
        for stop in range(start + 1, num_tokens + 2):
            sample = make_sample(window_of(3, num_tokens, [(start, stop)]))
            assert sample.tokens_T.tolist() == inputs[start:stop]
            assert sample.labels_T.tolist() == labels[start:stop]
            assert sample.tokens_T.dtype == sample.labels_T.dtype == np.int64


def test_an_empty_document_is_one_place() -> None:
    """What stands for a sample of which nothing could be read: it opens and closes at once."""
    window = Window(0, "source", 0, DTYPE)
    window.add_empty_document(STORED_EOS)
    sample = make_sample(window)
    assert sample.tokens_T.tolist() == sample.labels_T.tolist() == [EOS]
    assert sample.cu_seqlens.tolist() == [0, 1] and len(sample.document_ids) == 1


def test_windows_are_packed_one_after_the_other() -> None:
    """Offsets, token indices by slot, and the digests of the samples."""
    windows = [window_of(7, 5, [(0, 6), (2, 4)]), window_of(8, 5, [(1, 3)])]
    samples = [make_sample(window) for window in windows]
    batch = pack_windows(windows, [4, 5], seq_len=100)
    for name in ("tokens_T", "labels_T"):
        joined = np.concatenate([getattr(sample, name) for sample in samples])
        assert np.array_equal(getattr(batch, name), joined)
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 10] and batch.cu_seqlens.dtype == np.int32
    assert batch.token_index_T.tolist() == [*range(400, 408), *range(500, 502)]
    assert batch.sample_ids == (7, 8) and batch.sample_ends == (8, 10)
    alone = [pack_windows([window], [0], 100).sample_digests for window in windows]
    assert batch.sample_digests == (*alone[0], *alone[1])
    assert len(set(batch.sample_digests)) == 2
