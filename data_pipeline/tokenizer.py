"""Byte-level BPE tokenizers: load one, train one; text is always taken literally."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data_pipeline.errors import InputError
from data_pipeline.output_folder import reading
from data_pipeline.small_file import read_small

EOS_NAMES = ("<|endoftext|>", "</s>", "<|eos|>")
TOKENIZER_FILE = "tokenizer.json"
SMALLEST_VOCAB = 257  # 256 bytes and the end-of-text token
LONG_WORD = 1000
"""Most characters of a word that a tokenizer is trained on; base64 and DNA have longer ones."""
_LONG_SPACE = re.compile(rf"\s{{{LONG_WORD + 1}}}")
# runs of what byte-level tokenizers take for one word: letters, digits, signs, spaces
_LONG_RUN = re.compile(
    "|".join(
        f"{before}{one}{{{LONG_WORD + 1},}}"
        for before, one in (
            (r"(?<![^\W\d_])", r"[^\W\d_]"),
            (r"(?<!\d)", r"\d"),
            (r"(?<![^\w\s])(?<!_)", r"(?:[^\w\s]|_)"),
            (r"(?<!\s)", r"\s"),
        )
    )
)


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer that never reads a special token out of a text."""

    path: Path
    """Where it was loaded from."""

    contents: bytes = field(repr=False)
    """Bytes of the tokenizer.json that stands for it; kept with every shard folder."""

    sha256: str
    """Hex digest of `contents`: two shard folders fit together when theirs are equal."""

    vocab_size: int
    """One more than the largest token id."""

    eos_id: int
    """Token that opens every document and closes its labels."""

    dropout: float
    """Share of merges that its file asks to leave out at random; it is 0 in use."""

    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    """The library's object."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text alone: no special token is added or recognised."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of each text, computed by all cores."""
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of the tokens; special tokens are shown by their name."""
        text: str = self.backend.decode([int(token) for token in ids], skip_special_tokens=False)
        return text

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """Returns `decode` of each, computed by all cores."""
        ids = [tokens.tolist() for tokens in batch]
        texts: list[str] = self.backend.decode_batch(ids, skip_special_tokens=False)
        return texts


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json, or a folder with a tokenizer.json or with vocab.json and merges.txt.

    Raises:
        InputError: nothing to load there, an unreadable file, or no end-of-text token.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not file.is_file() and vocab.is_file() and merges.is_file():
        backend = _from_vocabulary(vocab, merges)
        eos, _ = _end_of_text(backend, path)
        backend.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
        contents = backend.to_str(pretty=True).encode("utf-8")
        return _wrap(backend, path, contents)
    if not file.exists():
        raise InputError(
            f"tokenizer {path}: no such file, and no folder with tokenizer.json or vocab.json and "
            "merges.txt; train one with `megadlcm data tokenizer`"
        )
    with reading(file):
        contents = read_small(file)
    return decode_tokenizer(contents, file)


def decode_tokenizer(contents: bytes, path: Path) -> Tokenizer:
    """Makes the tokenizer of a tokenizer.json.

    Args:
        contents: bytes of the file.
        path: where they come from, for messages.

    Raises:
        InputError: they are none, or have no end-of-text token.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(contents)
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"tokenizer {path}: not a tokenizer.json of the tokenizers library "
            f"({_one_line(error)}); train one with `megadlcm data tokenizer`"
        ) from error
    return _wrap(backend, path, contents)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-level BPE tokenizer and returns its tokenizer.json.

    The same texts in the same order give the same bytes.

    Args:
        texts: documents; read once.
        vocab_size: most entries it may have, `<|endoftext|>` (id 0) and the 256 bytes included.

    Raises:
        InputError: the vocabulary cannot hold every byte, or there is no text.
    """
    # All bytes are entries: there is no text that it could not encode.
    if vocab_size < SMALLEST_VOCAB:
        raise InputError(
            f"--vocab-size {vocab_size}: must be >= {SMALLEST_VOCAB} (256 bytes and "
            f"{EOS_NAMES[0]}); choose a larger one",
            key="--vocab-size",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        # Sorted: the library hands the alphabet over in hash order, ids must not follow it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = iter(texts)
    # The library makes a tokenizer of no text at all without a word.
    first = next(texts, None)
    if first is None:
        raise InputError("--input: no documents to train on; check the pattern", key="--input")
    cut = chain.from_iterable(map(_cut_long_words, chain([first], texts)))
    backend.train_from_iterator(cut, trainer)
    contents: bytes = backend.to_str(pretty=True).encode("utf-8")
    return contents


def _from_vocabulary(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Builds GPT-2's kind of tokenizer from its two files."""
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"tokenizer {vocab.parent}: vocab.json and merges.txt do not make a BPE tokenizer "
            f"({_one_line(error)}); fetch both files again"
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _end_of_text(backend: tokenizers.Tokenizer, path: Path) -> tuple[str, int]:
    """Returns name and id of the end-of-text token; raises InputError where there is none."""
    for name in EOS_NAMES:
        token = backend.token_to_id(name)
        if token is not None:
            return name, token
    raise InputError(
        f"tokenizer {path}: no end-of-text token, one of {', '.join(EOS_NAMES)} is needed; "
        "add it or train a tokenizer with `megadlcm data tokenizer`"
    )


def _wrap(backend: tokenizers.Tokenizer, path: Path, contents: bytes) -> Tokenizer:
    """Makes the library's object read texts literally and checks that it does."""
    eos, eos_id = _end_of_text(backend, path)
    shared = [name for name, token in backend.get_vocab().items() if token == eos_id]
    if len(shared) > 1:
        raise InputError(
            f"tokenizer {path}: token {eos_id} is the end of text and {_other(shared, eos)!r} as "
            "well, so that ordinary text would open documents; give each an id of its own"
        )
    dropout = getattr(backend.model, "dropout", None) or 0.0
    if dropout:
        # The same text is to have the same tokens, at any time and in any process.
        backend.model.dropout = None
    # A file may ask for a length to cut texts at, which would drop tokens mutely.
    backend.no_truncation()
    backend.no_padding()
    # Only tokens marked special can be read as plain text, and some files forget the mark.
    backend.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    backend.encode_special_tokens = True
    # Tried, not trusted: what a file says of its own tokens decides as well.
    if eos_id in backend.encode(f"a{eos}b", add_special_tokens=False).ids:
        raise InputError(
            f"tokenizer {path}: reads the text {eos!r} as the end of a document, which a text must "
            "not be able to say; mark the token as special in the file"
        )
    return Tokenizer(
        path=path,
        contents=contents,
        sha256=hashlib.sha256(contents).hexdigest(),
        # Ids may have holes: the largest bounds an embedding, their number does not.
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=eos_id,
        dropout=dropout,
        backend=backend,
    )


def _other(names: Sequence[str], name: str) -> str:
    return next(each for each in names if each != name)


def _cut_long_words(text: str) -> Iterator[str]:
    """Yields a text in pieces that hold no word longer than LONG_WORD; most texts are one piece."""
    # The trainer takes time by the square of a word's length. Splitting at spaces is a quick look.
    if max(map(len, text.split()), default=0) <= LONG_WORD and not _LONG_SPACE.search(text):
        yield text
        return
    start = 0
    for found in _LONG_RUN.finditer(text):
        for end in range(found.start() + LONG_WORD, found.end(), LONG_WORD):
            yield text[start:end]
            start = end
    yield text[start:]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
