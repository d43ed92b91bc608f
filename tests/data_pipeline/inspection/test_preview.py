"""What a person is shown of a sample is what the model gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path

import pytest

from data_pipeline import open_samples, read_index
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DamagedDataError, InputError
from data_pipeline.inspection.preview import (
    PreviewPiece,
    PreviewSample,
    preview_samples,
    render_sample,
    shorten,
)
from data_pipeline.reading.sources import read_tokenizer
from data_pipeline.shard_format.table import decode_table
from data_pipeline.storage.open import open_storage
from tests.support.tiny_shards import TEXTS, config_of, one_line

MakeShards = Callable[..., Path]
ASCII_TEXTS = [text for text in TEXTS if text.isascii()]


def num_samples_of(folder: Path, seq_len: int) -> int:
    """Samples of one epoch."""
    return -(-read_index(folder).num_stream_tokens // seq_len)


def test_the_pieces_of_an_epoch_make_up_the_texts(make_shards: MakeShards) -> None:
    """Each document is shown from its beginning to its end, nothing twice."""
    folder = make_shards(texts=ASCII_TEXTS, shard_tokens=60)
    config = config_of(SourceConfig(str(folder)), seq_len=7)
    pieces: defaultdict[str, dict[int, PreviewPiece]] = defaultdict(dict)
    for sample in preview_samples(config, 0, num_samples_of(folder, 7)):
        assert sample.epoch == 0
        for piece in sample.pieces:
            assert pieces[piece.document_id].setdefault(piece.start, piece) is piece
    assert len(read_index(folder).shards) > 1
    assert {name: len(parts) for name, parts in pieces.items() if len(parts) > 2}
    for number, text in enumerate(ASCII_TEXTS):
        parts = [piece for _, piece in sorted(pieces[f"d{number}"].items())]
        assert "".join(piece.text for piece in parts) == text
        assert parts[0].start == 0 and parts[0].borders.startswith("begins here")
        assert parts[-1].stop == parts[-1].places and parts[-1].borders.endswith("ends here")
        for piece, following in pairwise(parts):
            assert piece.stop == following.start
            assert piece.borders.endswith("goes on elsewhere")
            assert following.borders.startswith("continued")
        assert {piece.domain for piece in parts} == {"ab"[number % 2]}


def test_a_preview_shows_the_samples_of_training(make_shards: MakeShards) -> None:
    """Source, epoch, borders, ids and text of a mixture, from anywhere in it."""
    one, two = make_shards("one", shard_tokens=80), make_shards("two", ASCII_TEXTS[:2])
    config = config_of(
        SourceConfig(str(one), 0.75, "one"),
        SourceConfig(str(two), 0.25, "two"),
        seq_len=24,
        seed=5,
    )
    tokenizer = read_tokenizer(read_index(one), open_storage(one))
    start, count = 13, 60
    shown = list(preview_samples(config, start, count))
    given = list(islice(open_samples(config, start), count))
    for sample, trained in zip(shown, given, strict=True):
        assert (sample.number, sample.source, sample.epoch) == (
            trained.index,
            trained.source,
            trained.epoch,
        )
        assert tuple(piece.document_id for piece in sample.pieces) == trained.document_ids
        edges = trained.cu_seqlens.tolist()
        sizes = [piece.stop - piece.start for piece in sample.pieces]
        assert sizes == [end - begin for begin, end in pairwise(edges)]
        assert sample.num_tokens == len(trained.tokens_T)
        for piece, begin, end in zip(sample.pieces, edges, edges[1:], strict=False):
            opens = piece.start == 0  # by the end of text, which is not shown
            assert piece.text == tokenizer.decode(trained.tokens_T[begin + opens : end])
    assert {sample.source for sample in shown} == {"one", "two"}
    assert max(sample.epoch for sample in shown) > 0
    assert max(len(sample.pieces) for sample in shown) > 1


def test_held_out_documents_can_be_previewed(make_shards: MakeShards) -> None:
    """They are another split; one that names nothing is refused."""
    config = DataConfig(valid=(SourceConfig(str(make_shards())),), seq_len=16)
    (sample,) = preview_samples(config, 0, 1, "valid")
    assert sample.num_tokens == 16
    with pytest.raises(InputError, match=r"data\.train = \[\]") as error:
        list(preview_samples(config, 0, 1))
    one_line(error)


def test_damage_is_shown_as_the_policy_says(make_shards: MakeShards) -> None:
    """Where it is skipped the sample says what is left out of it."""
    folder = make_shards(texts=ASCII_TEXTS)
    shard = read_index(folder).shards[0]
    row = decode_table((folder / shard.table_name).read_bytes()).rows[1]
    tar = folder / shard.tar_name
    contents = bytearray(tar.read_bytes())
    contents[int(row["tokens_offset"])] ^= 1
    tar.write_bytes(contents)
    source, count = SourceConfig(str(folder)), num_samples_of(folder, 512)
    with pytest.raises(DamagedDataError, match="document 1"):
        list(preview_samples(config_of(source, seq_len=512), 0, count))
    config = config_of(source, seq_len=512, on_damage="skip")
    samples = list(preview_samples(config, 0, count))
    (lost,) = (piece for sample in samples for piece in sample.pieces if piece.damage)
    assert lost.document_id == "shard-000000, document 1" and lost.borders == "left out"
    trained = sum(sample.num_tokens for sample in samples)
    assert trained == read_index(folder).num_stream_tokens - int(row["num_tokens"]) - 1
    assert "checksum" in "".join(render_sample(sample, 80) for sample in samples)
    (folder / shard.table_name).unlink()
    (sample,) = preview_samples(config, 0, 1)
    assert [piece.document_id for piece in sample.pieces] == ["shard-000000"]
    assert sample.num_tokens == 0


def test_a_text_cannot_pass_for_something_else() -> None:
    """It stands behind a margin, and a terminal obeys none of it."""
    evil = "one\nsample 7: source web\x1b[2J\x07 \u202eabc\r\u2028end"
    piece = PreviewPiece("id\nsample 8:", "en\x1b", 3, 40, 90, evil)
    shown = render_sample(PreviewSample(5, "web", 2, (piece,)), 1000)
    lines = shown.split("\n")
    assert [line for line in lines if line.startswith("sample")] == [lines[0]]
    assert lines[0] == "sample 5: source web, epoch 2, 37 tokens in 1 piece"
    assert "places [3, 40) of 90, continued, goes on elsewhere" in lines[1]
    assert len(lines) == 4 and all(line.startswith("    | ") for line in lines[2:])
    assert all(character.isprintable() for character in shown.replace("\n", ""))


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_a_long_text_loses_its_middle(width: int) -> None:
    """And says how much."""
    text = "".join(chr(ord("a") + number % 26) for number in range(1000))
    short = shorten(text, width)
    head, _, rest = short.partition(" [... ")
    tail = rest.partition("...] ")[2]
    assert len(head) + len(tail) == width and text.startswith(head) and text.endswith(tail)
    assert f"{1000 - width:,} characters" in short
    assert shorten(text, 1000) == text
