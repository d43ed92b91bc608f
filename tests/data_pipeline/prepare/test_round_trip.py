"""No text is lost on the way to its tokens: refused, or counted where people look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import read_index
from data_pipeline.errors import InputError
from data_pipeline.inspection.describe import describe, read_altered
from data_pipeline.prepare.round_trip import altered_texts, check_tokenizer, token_bytes
from data_pipeline.prepare.write_shards import PrepareOptions, prepare
from data_pipeline.reading.shards import open_documents
from data_pipeline.shard_format.prepared import read_prepared
from data_pipeline.storage.open import open_storage
from data_pipeline.tokenizer import Tokenizer, decode_tokenizer, load_tokenizer
from tests.support.tiny_shards import TEXTS, one_line, write_jsonl

Change = Callable[[dict[str, Any]], object]


def normalized_by(kind: str, **options: object) -> Change:
    """A change to a normalizer."""
    return lambda contents: contents.update(normalizer={"type": kind, **options})


def lose_a_byte(contents: dict[str, Any]) -> None:
    """No byte fallback and no unknown token: the library drops what it has no token for."""
    del contents["model"]["vocab"]["\u00f0"]  # the first byte of an emoji


def not_unknown(contents: dict[str, Any]) -> None:
    """The same, and its place is marked."""
    lose_a_byte(contents)
    contents["model"]["vocab"]["<unk>"] = 300
    contents["model"]["unk_token"] = "<unk>"


def add_a_token(**options: object) -> Change:
    """A token that takes the spaces beside it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token = {"id": 300, "content": "<cat>", "special": False, **flags, **options}
    return lambda contents: contents["added_tokens"].append(token)


@pytest.fixture
def make_tokenizer(tokenizer_file: Path, tmp_path: Path) -> Callable[[Change], Tokenizer]:
    """Function(change of its tokenizer.json) -> tokenizer."""

    def make(change: Change) -> Tokenizer:
        contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        change(contents)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(contents), encoding="utf-8")
        return load_tokenizer(path)

    return make


@pytest.mark.parametrize(
    "change",
    [
        normalized_by("Lowercase"),
        normalized_by("NFKC"),
        normalized_by("Strip", strip_left=True, strip_right=True),
        normalized_by("StripAccents"),
        lose_a_byte,
        not_unknown,
        add_a_token(lstrip=True),
        add_a_token(rstrip=True),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused_before_any_work(
    change: Change, make_tokenizer: Callable[[Change], Tokenizer], tmp_path: Path
) -> None:
    """Whatever the texts are; on request it is said and goes on."""
    tokenizer = make_tokenizer(change)
    source = write_jsonl(tmp_path / "a.jsonl", ["plain ascii"])
    options = PrepareOptions((str(source),), tokenizer.path, tmp_path / "shards")
    with pytest.raises(InputError, match=r"comes back from its tokens as .*--allow-alt") as error:
        prepare(options)
    one_line(error)
    assert not options.output.exists()
    (remark,) = check_tokenizer(tokenizer, allow_altered=True)
    assert "are counted" in remark


def test_good_tokenizers_pass(make_tokenizer: Callable[[Change], Tokenizer]) -> None:
    """A token in the middle of a text takes nothing from it."""
    for change in (lambda contents: None, add_a_token(), add_a_token(special=True)):
        assert check_tokenizer(make_tokenizer(change), allow_altered=False) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_in_another_spelling_are_counted_with_the_bytes_a_model_sees(
    workers: int,
    make_tokenizer: Callable[[Change], Tokenizer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NFC, as published tokenizers have it; in every shard, and where people look."""
    tokenizer = make_tokenizer(normalized_by("NFC"))
    texts = [*TEXTS, "e\u0301 one", *TEXTS, "two e\u0301", "A\u030a"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = PrepareOptions(
        (str(source),), tokenizer.path, tmp_path / "shards", shard_tokens=50, workers=workers
    )
    prepared = prepare(options)
    assert r"'e\u0301 and \xe9' comes back" in capsys.readouterr().err
    assert prepared.index is not None and len(prepared.index.shards) > 2
    assert prepared.altered == 3 == prepare(options).altered
    spelt = [tokenizer.decode(document.tokens_T) for document in open_documents(options.output)]
    assert spelt[len(TEXTS)] == "\u00e9 one" and spelt[: len(TEXTS)] == TEXTS
    assert prepared.index.num_bytes == sum(len(text.encode()) for text in spelt)
    assert read_prepared(options.output)["altered_documents"] == 3
    index = read_index(options.output)
    shown = describe(index, read_altered(open_storage(str(options.output))))
    assert "altered" in shown and "3 documents" in shown


def test_what_the_first_texts_do_not_show_is_found_in_the_document(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    """The character that stands for a space in some tokenizers; the same command may go on."""
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    contents["normalizer"] = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(contents), encoding="utf-8")
    source = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "one\u2581two"])
    options = {"inputs": (str(source),), "tokenizer": changed, "output": tmp_path / "shards"}
    with pytest.raises(InputError, match=r"a\.jsonl:7: document 'd6': .*'one two'") as error:
        prepare(PrepareOptions(**options, shard_tokens=20))
    one_line(error)
    prepared = prepare(PrepareOptions(**options, shard_tokens=20, allow_altered=True))
    assert prepared.altered == 1 and prepared.index is not None
    assert prepared.index.num_documents == 7


def test_a_folder_of_a_good_tokenizer_says_nothing_of_it(make_shards: Callable[..., Path]) -> None:
    """Its bytes are those of folders that were written before anybody looked."""
    folder = make_shards()
    assert "altered_documents" not in read_prepared(folder)
    assert "altered" not in describe(read_index(folder), read_altered(open_storage(str(folder))))


def test_an_ordinary_text_that_opens_a_document_is_named(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    """A merge may make the end of text where the tokenizer was not tried."""
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    contents["model"]["vocab"]["</s>"] = contents["model"]["vocab"].pop("<|endoftext|>")
    contents["model"]["vocab"]["</"] = 300
    contents["model"]["vocab"]["</s"] = 301
    contents["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    contents["added_tokens"] = []
    contents["pre_tokenizer"]["use_regex"] = False
    # only beside this letter the pieces do not merge otherwise
    contents["model"]["vocab"]["a<"] = 302
    contents["model"]["merges"].insert(0, ["a", "<"])
    (tmp_path / "t.json").write_text(json.dumps(contents), encoding="utf-8")
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", "x</s>y"])
    options = PrepareOptions((str(source),), tmp_path / "t.json", tmp_path / "shards")
    with pytest.raises(InputError, match=r"jsonl:2: .*end of text, token 0, among") as error:
        prepare(options)
    one_line(error)


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_tokens_spell_what_they_decode_to(tokenizer_file: Path, texts: list[str]) -> None:
    """The quick way is that of the library; another text, or another border, is noticed."""
    tokenizer = load_tokenizer(tokenizer_file)
    table = token_bytes(tokenizer)
    assert table is not None
    tokens = [np.array(ids, dtype="<u2") for ids in tokenizer.encode_batch(texts)]
    assert [table.spell(ids).decode() for ids in tokens] == texts
    assert altered_texts(tokenizer, texts, tokens) == {}
    changed = [*texts[:-1], texts[-1] + "x"]
    assert altered_texts(tokenizer, changed, tokens) == {len(texts) - 1: texts[-1]}
    assert altered_texts(tokenizer, ["ab", "c"], [tokens[0]] * 2).keys() == {
        at for at, text in enumerate(["ab", "c"]) if text != texts[0]
    }


def test_a_border_at_another_place_is_noticed(tokenizer_file: Path) -> None:
    """Texts that are the same when they are joined."""
    tokenizer = load_tokenizer(tokenizer_file)
    tokens = [np.array(tokenizer.encode(text)) for text in ("ab", "c")]
    assert altered_texts(tokenizer, ["a", "bc"], tokens) == {0: "ab", 1: "c"}


def test_long_documents_are_compared_to_their_end(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.prepare.round_trip.STRETCH_TOKENS", 7)
    tokenizer = load_tokenizer(tokenizer_file)
    text = "".join(TEXTS)
    tokens = np.array(tokenizer.encode(text))
    assert altered_texts(tokenizer, [text], [tokens]) == {}
    assert altered_texts(tokenizer, [text[:-1] + "!"], [tokens]) == {0: text}


def test_another_decoder_has_no_table(tokenizer_file: Path) -> None:
    """There a token's bytes may depend on its neighbours: the library decodes."""
    contents = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    contents["decoder"] = {"type": "Sequence", "decoders": [contents["decoder"]]}
    tokenizer = decode_tokenizer(json.dumps(contents).encode(), Path("t.json"))
    assert token_bytes(tokenizer) is None
    tokens = [np.array(tokenizer.encode(text)) for text in TEXTS]
    assert altered_texts(tokenizer, TEXTS, tokens) == {}
    assert altered_texts(tokenizer, [*TEXTS[:-1], "x"], tokens) == {len(TEXTS) - 1: TEXTS[-1]}
