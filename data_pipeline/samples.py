"""Sample n of a run, from nothing but the data configuration and n.

The nest:

    sample n -> mixture: source s, its k-th sample -> order: epoch, window -> pieces of documents
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.batch import Sample
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.index import ShardIndex, read_index
from data_pipeline.mixture import Mixture, source_quotas
from data_pipeline.order import SourceOrder
from data_pipeline.packing import cut_piece, join_pieces
from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import TOKENIZER_FILE, load_tokenizer
from data_pipeline.verify import check_folder


@dataclass(frozen=True)
class SourceSummary:
    """What a run must know of its sources before it opens them."""

    tokenizer: Path
    """Tokenizer file or folder the run uses."""
    train_tokens: int
    """Tokens of one epoch of every train source, as trained."""


class SampleReader:
    """Any sample of a split by number; for one thread, which must close it."""

    def __init__(self, data: DataConfig, split: str = "train") -> None:
        """Reads the indexes of the split's sources; raises InputError where one is unusable."""
        sources = data.sources(split)
        if not sources:
            raise InputError(f"data.{split} = [], must name a shard folder; add {{path: FOLDER}}")
        seed = data.seed or 0
        self._mixture = Mixture(source_quotas(sources, split), seed)
        self._sources = [
            SourceReader(source, number, data, seed) for number, source in enumerate(sources)
        ]

    def sample(self, number: int) -> Sample:
        """Returns sample `number`, O(1) in the number; raises InputError on a damaged shard."""
        turn = self._mixture.turn(number)
        return self._sources[turn.source].sample(turn.number, number)

    def close(self) -> None:
        """Closes the files that are open."""
        for source in self._sources:
            source.reader.close()


class SourceReader:
    """The samples of one source."""

    def __init__(self, source: SourceConfig, number: int, data: DataConfig, seed: int) -> None:
        """Reads the source's index."""
        index = read_index(source.path)
        self.reader = ShardReader(index)
        self.order = SourceOrder(
            index.shard_stream_tokens,
            self.reader.stream_tokens,
            seq_len=data.seq_len,
            seed=seed,
            source=number,
            shuffle_block=data.shuffle_block,
        )
        self._label = source.label
        self._eos = index.eos_id

    def sample(self, turn: int, number: int) -> Sample:
        """Returns the source's sample `turn` as sample `number` of the run."""
        place = self.order.place(turn)
        pieces, ids = [], []
        for shard, document, start, stop in self.order.pieces(place):
            metadata = self.reader.metadata(shard, document)
            read_tokens = partial(self.reader.tokens, shard, document)
            num_tokens = metadata["num_tokens"]
            pieces.append(cut_piece(read_tokens, num_tokens, start, stop, self._eos))
            ids.append(metadata["id"])
        return join_pieces(number, self._label, place.epoch, pieces, ids)


def open_samples(data: DataConfig, start: int = 0, split: str = "train") -> Iterator[Sample]:
    """Yields samples start, start + 1, ... for ever.

    The order is a function of the configuration alone, so `start=k` gives what an uninterrupted
    iterator gives after k samples, at no cost in k.

    Args:
        data: sources, seq_len, seed (None counts as 0), shuffle_block.
        start: first sample number, >= 0.
        split: "train" or "valid".

    Raises:
        InputError: an unusable source, or a damaged shard when it is reached.
    """
    if start < 0:
        raise InputError(f"start = {start}, must be >= 0; count samples from the run's beginning")
    return _samples(SampleReader(data, split), start)


def _samples(reader: SampleReader, number: int) -> Iterator[Sample]:
    try:
        while True:
            yield reader.sample(number)
            number += 1
    finally:
        reader.close()


def check_sources(data: DataConfig, vocab_size: int) -> SourceSummary:
    """Checks every shard folder of a run as far as can be done without reading the shards.

    Every shard and table must be there and whole in size, its first and last record must begin
    with a tar header; all folders and data.tokenizer must agree on the tokenizer. Bytes changed
    inside a shard are found when they are read, or by `megadlcm data verify`.

    Args:
        data: configuration of the run.
        vocab_size: model.vocab_size.

    Raises:
        InputError: the first thing found wrong.
    """
    sources = (*data.train, *data.valid)
    if not sources:
        raise InputError("data.train = [], must name a shard folder; add {path: FOLDER}")
    indexes = [read_index(source.path) for source in sources]
    first = indexes[0]
    for index in indexes:
        _check_tokenizer(index, first, vocab_size)
    checked = {index.folder.resolve(): index for index in indexes}
    for index in checked.values():
        check_folder(index)
    tokenizer = Path(data.tokenizer) if data.tokenizer else first.folder / TOKENIZER_FILE
    if data.tokenizer and load_tokenizer(tokenizer).sha256 != first.tokenizer_sha256:
        raise InputError(
            f"data.tokenizer = {data.tokenizer}: not the tokenizer {first.folder} was prepared "
            "with; leave it out to use the one kept with the shards"
        )
    train = indexes[: len(data.train)]
    return SourceSummary(tokenizer, sum(index.num_stream_tokens for index in train))


def _check_tokenizer(index: ShardIndex, first: ShardIndex, vocab_size: int) -> None:
    if index.tokenizer_sha256 != first.tokenizer_sha256:
        raise InputError(
            f"data: {index.folder} and {first.folder} were prepared with different tokenizers, one "
            "run has one; prepare them again with the same --tokenizer"
        )
    if index.max_token_id >= vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size}: {index.folder} holds token {index.max_token_id}, "
            f"tokens must be below it; set model.vocab_size >= {index.max_token_id + 1}"
        )
