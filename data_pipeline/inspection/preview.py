"""Samples as a person reads them: which pieces of which documents, and their text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import DamagedDataError, InputError
from data_pipeline.quotas import source_quotas
from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.order import Stretch
from data_pipeline.reading.samples import SourceReader
from data_pipeline.reading.sources import read_tokenizer
from data_pipeline.tables import printable
from data_pipeline.tokenizer import Tokenizer

# Line breaks and tabs of a text are shown as they are; all else that moves a cursor is not.
_KEPT = "\n\t"


class PreviewPiece(NamedTuple):
    """A stretch of a document in a sample."""

    document_id: str
    domain: str
    start: int
    """First place of the document's stream: num_tokens tokens and one end of text."""
    stop: int
    """One past the last place."""
    places: int
    """Of the whole document."""
    text: str
    """Of the inputs at these places, as it is stored."""
    damage: str = ""
    """Why there is no text."""

    @property
    def borders(self) -> str:
        """Says where the document goes on outside of this sample."""
        if self.damage:
            return "left out"
        begin = "begins here" if self.start == 0 else "continued"
        return f"{begin}, {'ends here' if self.stop == self.places else 'goes on elsewhere'}"


class PreviewSample(NamedTuple):
    """A sample of a split."""

    number: int
    source: str
    epoch: int
    pieces: tuple[PreviewPiece, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained on."""
        return sum(piece.stop - piece.start for piece in self.pieces if not piece.damage)


def preview_samples(
    data: DataConfig, start: int, num_samples: int, split: str = "train"
) -> Iterator[PreviewSample]:
    """Yields samples of a configuration with the text of their pieces.

    Args:
        data: sources, seq_len, seed (None counts as 0), shuffle_block, how to read.
        start: first sample number, >= 0.
        num_samples: how many, >= 1.
        split: "train" or "valid".

    Raises:
        InputError: an unusable source, or a damaged shard where data.on_damage is stop.
        StorageError: the storage does not answer.
    """
    sources = data.sources(split)
    if not sources:
        raise InputError(
            f"data.{split} = [], must name a shard folder; add {{path: FOLDER}}",
            key=f"data.{split}",
        )
    mixture = Mixture(source_quotas(sources, split), data.seed or 0)
    readers = [
        _PreviewReader(SourceReader(source, data, data.seed or 0, key), data.on_damage == "skip")
        for key, source in enumerate(sources)
    ]
    try:
        for number in range(start, start + num_samples):
            turn = mixture.turn(number)
            epoch, pieces = readers[turn.source].pieces(turn.number)
            yield PreviewSample(number, sources[turn.source].label, epoch, pieces)
    finally:
        for reader in readers:
            reader.close()


class _PreviewReader:
    """One source and its tokenizer."""

    def __init__(self, source: SourceReader, skips: bool) -> None:
        self._order, self._reader, self._skips = source.order, source.reader, skips
        self._tokenizer: Tokenizer = read_tokenizer(source.reader.index, source.reader.storage)

    def close(self) -> None:
        self._reader.close()

    def pieces(self, turn: int) -> tuple[int, tuple[PreviewPiece, ...]]:
        """Returns the epoch and the pieces of the source's sample `turn`."""
        place = self._order.place(turn)
        found: list[PreviewPiece] = []
        for stretch in self._order.stretches(place):
            try:
                # Reads the document table: one that is damaged takes the whole stretch with it.
                pieces = self._order.pieces(place.epoch, stretch)
            except DamagedDataError as error:
                found.append(self._left_out(stretch, error))
                continue
            for document, start, stop in pieces:
                part = Stretch(stretch.shard, start, stop)
                try:
                    found.append(self._piece(document, part))
                except DamagedDataError as error:
                    found.append(self._left_out(part, error, document))
        return place.epoch, tuple(found)

    def _piece(self, document: int, part: Stretch) -> PreviewPiece:
        shard = self._reader.shard(part.shard)
        places = shard.num_tokens[document] + 1
        # Input 0 is the end of text before the document, input i its token i - 1.
        tokens = shard.tokens(document, max(part.start - 1, 0), part.stop - 1)
        metadata = shard.metadata(document)
        text = self._tokenizer.decode(np.frombuffer(tokens, shard.dtype))
        return PreviewPiece(metadata["id"], metadata["domain"], part.start, part.stop, places, text)

    def _left_out(
        self, part: Stretch, error: DamagedDataError, document: int | None = None
    ) -> PreviewPiece:
        if not self._skips:
            raise error
        name = self._reader.index.shards[part.shard].name
        if document is not None:
            name = f"{name}, document {document}"
        return PreviewPiece(name, "", part.start, part.stop, part.stop, "", str(error))


def render_sample(sample: PreviewSample, width: int) -> str:
    """Returns what a terminal shows of a sample.

    Args:
        sample: its pieces.
        width: most characters of a text; longer ones lose their middle.
    """
    count = len(sample.pieces)
    lines = [
        f"sample {sample.number}: source {printable(sample.source)}, epoch {sample.epoch}, "
        f"{sample.num_tokens:,} tokens in {count} {'piece' if count == 1 else 'pieces'}"
    ]
    for number, piece in enumerate(sample.pieces, 1):
        places = f"[{piece.start:,}, {piece.stop:,}) of {piece.places:,}"
        domain = f" ({printable(piece.domain)})" if piece.domain else ""
        lines.append(
            f"  piece {number}: {printable(piece.document_id)}{domain}, places {places}, "
            f"{piece.borders}"
        )
        shown = piece.damage or shorten(piece.text, width)
        lines += [f"    | {line}" for line in printable(shown, _KEPT).split("\n")]
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """Returns a text of at most `width` characters and a note on how many are left out."""
    if len(text) <= width:
        return text
    head, tail = width - width // 2, width // 2
    note = f" [... {len(text) - width:,} characters ...] "
    # By position, not by a negative index: -0 would be the whole text.
    return text[:head] + note + text[len(text) - tail :]
