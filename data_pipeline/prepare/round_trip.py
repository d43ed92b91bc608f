"""Does a text come back from its tokens? Asked of a few texts at first, then of every document.

What a tokenizer loses, a model never sees, and nothing that is read later could tell. Another
spelling that Unicode calls equivalent (NFC of a text, in some published tokenizers) is counted; all
else is refused unless it is asked for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import decoders, pre_tokenizers

from data_pipeline.errors import InputError
from data_pipeline.tokenizer import Tokenizer

STRETCH_TOKENS = 1 << 16
"""Spelt at once: more would leave the processor's cache."""
_SHOWN = 30
_PROBES = (
    "Capital LETTERS and small ones",
    "e\u0301 and \u00e9",  # one in NFC, and in nothing that is lost
    " one space before,  two inside and after  ",
    "\ttab\nline\r\n\n  indented\x0b\x0c\x85",
    "caf\u00e9 \u00dfa\u0130 na\u00efve \u0152uvre \u2018quoted\u2019 \u2014 \u2026",
    "\ufb01ne \uff21\uff22 \u2460 \u00bd \u00b2 \u2122 \uff76",  # other characters in NFKC
    "\u5929\u5730\u7384\u9ec4 \u65e5\u672c\u8a9e\u304c \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0902",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001d4d0",
    "\u00a0 \u2003 \u3000 \u200b \u00ad \ufeff",
    "<unk> <s> </s> <pad> <mask> [UNK] [CLS] [SEP] [MASK]",
    "".join(map(chr, range(128))),
    "".join(map(chr, range(0x80, 0x800))),  # all second bytes, all first ones of two
    "".join(map(chr, [*range(0x800, 0xD800, 0x1000), 0xE000, 0xF000])),
    "".join(map(chr, range(0x10000, 0x110000, 0x40000))),
)


def check_tokenizer(tokenizer: Tokenizer, allow_altered: bool) -> list[str]:
    """Tries a tokenizer on texts of all kinds, and on the names of its own tokens.

    Args:
        tokenizer: which.
        allow_altered: let pass what does not come back.

    Returns:
        What is odd about it, for people.

    Raises:
        InputError: it loses a text.
    """
    # What a token takes from its surroundings shows only between spaces.
    names = [f"a  {name}  b" for name in _added_names(tokenizer)]
    altered = ""
    for text in (*_PROBES, *names):
        back = tokenizer.decode(tokenizer.encode(text))
        if back == text:
            continue
        change = f"tokenizer {tokenizer.path}: {describe_change(text, back)}"
        if not (allow_altered or is_equivalent(text, back)):
            raise InputError(
                f"{change}: a model would never see such text; take a tokenizer that keeps all of "
                "it, as `megadlcm data tokenizer` makes, or pass --allow-altered",
                key="--tokenizer",
            )
        altered = altered or f"{change}; documents that it alters are counted"
    remarks = [altered] if altered else []
    if tokenizer.dropout:
        remarks.append(
            f"tokenizer {tokenizer.path}: asks for dropout {tokenizer.dropout:g}, which is "
            "switched off: a text has the same tokens every time"
        )
    return remarks


def describe_change(text: str, back: str) -> str:
    """Returns where a text and what came back from its tokens begin to differ, for people."""
    pairs = enumerate(zip(text, back, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), min(len(text), len(back)))
    begin = max(at - _SHOWN // 3, 0)
    shown, instead = (each[begin : begin + _SHOWN] for each in (text, back))
    if is_equivalent(text, back):  # which look alike
        return f"the text {shown!a} comes back from its tokens as {instead!a}"
    return f"the text {shown!r} comes back from its tokens as {instead!r}"


def is_equivalent(text: str, back: str) -> bool:
    """Whether two texts are one by Unicode's canonical equivalence."""
    return unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", back)


def altered_texts(
    tokenizer: Tokenizer, texts: Sequence[str], tokens: Sequence[np.ndarray]
) -> dict[int, str]:
    """Returns the texts that do not come back from their tokens: their numbers and what does.

    Args:
        tokenizer: whose tokens they are.
        texts: of the documents.
        tokens: of each; unsigned (num_tokens,), num_tokens > 0.
    """
    if not texts or _all_come_back(tokenizer, texts, tokens):
        return {}
    backs = tokenizer.decode_batch(tokens)
    pairs = enumerate(zip(texts, backs, strict=True))
    return {at: back for at, (text, back) in pairs if back != text}


def _added_names(tokenizer: Tokenizer) -> Iterator[str]:
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        yield token.content


@dataclass(frozen=True)
class TokenBytes:
    """What each token of a byte-level tokenizer spells."""

    contents: np.ndarray
    """uint8, of all tokens one after the other."""
    starts: np.ndarray
    """int64 (vocab_size,): where each begins there."""
    lengths: np.ndarray
    """int64 (vocab_size,)."""

    def spell(self, tokens: np.ndarray) -> bytes:
        """Returns the bytes of some tokens."""
        lengths = self.lengths[tokens]
        ends = lengths.cumsum()
        # Place of each byte: the beginning of its token, and how far it is behind it.
        places = np.repeat(self.starts[tokens] - ends + lengths, lengths)
        places += np.arange(len(places))
        return self.contents[places].tobytes()


def token_bytes(tokenizer: Tokenizer) -> TokenBytes | None:
    """Returns what the tokens spell; None where that depends on their neighbours."""
    if not isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return None
    byte_of = _byte_of_character()
    spelt = [b""] * tokenizer.vocab_size
    for name, token in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        # A name that is not written in the alphabet of bytes stands for itself.
        plain = all(character in byte_of for character in name)
        spelt[token] = bytes(map(byte_of.__getitem__, name)) if plain else name.encode("utf-8")
    lengths = np.array([len(each) for each in spelt], dtype=np.int64)
    contents = np.frombuffer(b"".join(spelt), dtype=np.uint8)
    return TokenBytes(contents, lengths.cumsum() - lengths, lengths)


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable characters are the bytes they are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The others follow from 256 on, in the order of their bytes.
    shown = {ord(character) for character in alphabet if ord(character) < 256}
    hidden = (byte for byte in range(256) if byte not in shown)
    return {each: ord(each) if ord(each) < 256 else next(hidden) for each in alphabet}


def _all_come_back(
    tokenizer: Tokenizer, texts: Sequence[str], tokens: Sequence[np.ndarray]
) -> bool:
    """Whether that is certain; far quicker than to decode, and true of nearly every batch."""
    table = _table_of(tokenizer)
    if table is None:
        return False
    given = [text.encode("utf-8") for text in texts]
    # Length by length first: equal bytes in a row may still be divided otherwise.
    if any(
        len(text) != int(table.lengths[ids].sum()) for text, ids in zip(given, tokens, strict=True)
    ):
        return False
    joined, whole = np.concatenate(tokens), memoryview(b"".join(given))
    at = 0
    for start in range(0, len(joined), STRETCH_TOKENS):
        spelt = table.spell(joined[start : start + STRETCH_TOKENS])
        if whole[at : at + len(spelt)] != spelt:
            return False
        at += len(spelt)
    return True


_tables: dict[str, TokenBytes | None] = {}


def _table_of(tokenizer: Tokenizer) -> TokenBytes | None:
    # By digest: made once in a process, which has one tokenizer.
    if tokenizer.sha256 not in _tables:
        _tables[tokenizer.sha256] = token_bytes(tokenizer)
    return _tables[tokenizer.sha256]
