"""Text is taken literally, comes back byte for byte, and training is reproducible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.prepare.round_trip import check_tokenizer
from data_pipeline.tokenizer import (
    LONG_WORD,
    SMALLEST_VOCAB,
    _cut_long_words,
    decode_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tests.support.tiny_shards import TEXTS, one_line


def test_a_text_cannot_say_end_of_text(tokenizer_file: Path) -> None:
    """Whatever the library's defaults; the library itself would read the special token."""
    tokenizer = load_tokenizer(tokenizer_file)
    text = "a<|endoftext|>b<|endoftext|>"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text, text])[1]):
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text
    tokenizer.backend.encode_special_tokens = False
    assert tokenizer.eos_id in tokenizer.encode(text)  # the check above was not vacuous


def test_an_end_of_text_that_its_file_does_not_mark_as_special_is_literal_too(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    """Some published files forget the mark."""
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    assert contents["added_tokens"][0]["special"] is True
    contents["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


@given(texts=st.lists(st.text(), max_size=4))
def test_any_text_comes_back(tokenizer_file: Path, texts: list[str]) -> None:
    """A byte-level tokenizer has no unknown text; a batch equals its texts alone."""
    tokenizer = load_tokenizer(tokenizer_file)
    encoded = tokenizer.encode_batch(texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= token < tokenizer.vocab_size for ids in encoded for token in ids)


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """Shard folders are told apart by the digest of these bytes."""
    first, second = (train_tokenizer(iter(TEXTS * 3), vocab_size=290) for _ in range(2))
    assert first == second
    (tmp_path / "tokenizer.json").write_bytes(first)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 290
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([0]) == "<|endoftext|>"
    assert tokenizer.sha256 == load_tokenizer(tmp_path / "tokenizer.json").sha256


def test_the_two_files_of_gpt2_make_a_tokenizer(tokenizer_file: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt give the tokens of the tokenizer.json they were taken from."""
    whole = load_tokenizer(tokenizer_file)
    model = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    parts = load_tokenizer(tmp_path)
    for text in [*TEXTS, "a<|endoftext|>b"]:
        assert parts.encode(text) == whole.encode(text)
    assert (parts.eos_id, parts.vocab_size) == (whole.eos_id, whole.vocab_size)
    kept = tmp_path / "kept.json"
    kept.write_bytes(parts.contents)
    assert load_tokenizer(kept).sha256 == parts.sha256
    assert load_tokenizer(kept).encode(TEXTS[0]) == whole.encode(TEXTS[0])


def test_what_cannot_be_used_is_refused_in_one_line(tokenizer_file: Path, tmp_path: Path) -> None:
    """Missing, not a tokenizer, without an end-of-text token, too small, without text."""
    with pytest.raises(InputError, match="no such file") as error:
        load_tokenizer(tmp_path / "absent.json")
    one_line(error)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"not a tokenizer\.json") as error:
        load_tokenizer(broken)
    one_line(error)
    named = tokenizer_file.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>")
    broken.write_text(named, encoding="utf-8")
    with pytest.raises(InputError, match="no end-of-text token") as error:
        load_tokenizer(broken)
    one_line(error)
    with pytest.raises(InputError, match=f"must be >= {SMALLEST_VOCAB}"):
        train_tokenizer(TEXTS, vocab_size=256)
    with pytest.raises(InputError, match="no documents"):
        train_tokenizer([], vocab_size=300)


def test_dropout_is_switched_off(tokenizer_file: Path) -> None:
    """A text has the same tokens each time, and those of the file without it."""
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    contents["model"]["dropout"] = 0.5
    path = Path("t.json")
    tokenizer = decode_tokenizer(json.dumps(contents).encode(), path)
    whole = load_tokenizer(tokenizer_file)
    assert (tokenizer.dropout, whole.dropout) == (0.5, 0.0)
    assert {tuple(tokenizer.encode(TEXTS[0])) for _ in range(20)} == {tuple(whole.encode(TEXTS[0]))}
    remark = check_tokenizer(tokenizer, allow_altered=False)
    assert remark == [
        "tokenizer t.json: asks for dropout 0.5, which is switched off: a text has the same tokens "
        "every time"
    ]
    tokenizer.backend.model.dropout = 0.5  # the comparison above was not vacuous
    assert len({tuple(tokenizer.encode(TEXTS[0])) for _ in range(20)}) > 1


def test_an_end_of_text_that_is_another_token_as_well_is_refused(tokenizer_file: Path) -> None:
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    contents["model"]["vocab"]["the"] = contents["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(InputError, match="token 0 is the end of text and 'the' as well") as error:
        decode_tokenizer(json.dumps(contents).encode(), Path("t.json"))
    one_line(error)


def test_words_of_any_length_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where they are too long, as texts that follow each other; nothing is lost of them."""
    long = LONG_WORD * 3 + 7
    for word in ("ab" * long, "\u5929" * long, "1" * long, "=" * long, "_-" * long, " \n" * long):
        text = f"some {word} words"
        cut = list(_cut_long_words(text))
        assert "".join(cut) == text and len(cut) > 3
        assert max(map(len, cut)) <= LONG_WORD + len("some  words")
    ordinary = [*TEXTS, "word " * 10_000, "a" * LONG_WORD, "a-1" * LONG_WORD]
    assert [list(_cut_long_words(text)) for text in ordinary] == [[text] for text in ordinary]
    trained = train_tokenizer(ordinary, 300)
    monkeypatch.setattr("data_pipeline.tokenizer._cut_long_words", lambda text: [text])
    assert train_tokenizer(ordinary, 300) == trained
