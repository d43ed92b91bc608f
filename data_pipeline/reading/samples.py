"""Sample n of a run, from nothing but the data configuration and n.

The nest:

    sample n -> phase -> mixture: source s, its k-th sample -> order: epoch, window
             -> stretches of shards -> pieces of documents -> tokens
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DamagedDataError, InputError
from data_pipeline.masking import masked
from data_pipeline.quotas import source_quotas
from data_pipeline.reading.batch import Sample, Skipped
from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.order import SourceOrder, Stretch, WindowPlace
from data_pipeline.reading.packing import Window, make_sample
from data_pipeline.reading.phases import Phase
from data_pipeline.reading.shards import ShardReader, stored_dtype
from data_pipeline.shard_format.index import ShardIndex, read_index
from data_pipeline.storage.open import open_storage


class SampleReader:
    """Any sample of a split by number; for any number of threads."""

    def __init__(
        self,
        data: DataConfig,
        split: str = "train",
        phase: Phase | None = None,
    ) -> None:
        """Reads the indexes of the split's sources.

        Args:
            data: sources, seq_len, seed (None counts as 0), shuffle_block, how to read.
            split: "train" or "valid".
            phase: where the sources stand in a run that has changed them; None: at their start.

        Raises:
            InputError: no source, or an unusable one.
            StorageError: the storage does not answer.
        """
        sources = data.sources(split)
        if not sources:
            raise InputError(
                f"data.{split} = [], must name a shard folder; add {{path: FOLDER}}",
                key=f"data.{split}",
            )
        seed = data.seed or 0
        self._mixture = Mixture(source_quotas(sources, split), seed)
        self._first_sample = phase.first_sample if phase else 0
        # A source that stays in a new phase goes on where it was; keys keep their orders apart.
        self._first_turns = [place.first_turn for place in phase.sources] if phase else None
        keys = [place.key for place in phase.sources] if phase else range(len(sources))
        self._sources = [
            SourceReader(source, data, seed, key) for source, key in zip(sources, keys, strict=True)
        ]
        if len({source.dtype for source in self._sources}) > 1:
            raise InputError(
                f"data.{split}: its shards hold tokens of different sizes, so they have different "
                "tokenizers; prepare them again with the same --tokenizer",
                key=f"data.{split}",
            )

    def sample(self, number: int) -> Sample:
        """Returns sample `number`, O(1) in the number.

        Raises:
            DamagedDataError: its bytes are missing or not those written, and on_damage is stop.
            StorageError: the storage does not answer.
        """
        return make_sample(self.window(number, with_ids=True))

    def window(self, number: int, with_ids: bool = False) -> Window:
        """Returns sample `number` as it is stored; ids of documents cost a read each."""
        turn = self._mixture.turn(number - self._first_sample)
        first = self._first_turns[turn.source] if self._first_turns else 0
        return self._sources[turn.source].window(first + turn.number, number, with_ids)

    def busy_with(self) -> str:
        """Returns which shards are being read just now, for messages."""
        shards = sorted({shard for source in self._sources for shard in source.busy_with()})
        return ", ".join(shards) or "nothing"

    def close(self) -> None:
        for source in self._sources:
            source.reader.close()


class SourceReader:
    """The samples of one source."""

    def __init__(self, source: SourceConfig, data: DataConfig, seed: int, key: int) -> None:
        """Reads the source's index."""
        storage = open_storage(source.path, data.storage)
        index = read_index(source.path, storage)
        self.reader = ShardReader(index, storage)
        self.order = make_order(index, self.reader, data, seed, key)
        self._label = source.label
        self.dtype = stored_dtype(index)
        # As it would be stored: texts are joined as bytes and converted once for a whole window.
        self._eos = np.array([index.eos_id], self.dtype).tobytes()
        self._skips = data.on_damage == "skip"
        self._busy: dict[int, int] = {}

    def busy_with(self) -> list[str]:
        """Returns the paths of the shards that threads are reading just now."""
        # A copy: threads write to it meanwhile.
        shards = set(self._busy.copy().values())
        index, storage = self.reader.index, self.reader.storage
        return [masked(storage.path(index.shards[shard].tar_name)) for shard in shards]

    def window(self, turn: int, number: int, with_ids: bool) -> Window:
        """Returns the source's sample `turn` as sample `number` of the run."""
        place = self.order.place(turn)
        window = Window(number, self._label, place.epoch, self.dtype)
        thread = threading.get_ident()
        for stretch in self.order.stretches(place):
            self._busy[thread] = stretch.shard
            try:
                self._read_stretch(window, place, stretch, with_ids)
            except DamagedDataError as error:
                self._leave_out(window, stretch, None, stretch.stop - stretch.start, error)
        del self._busy[thread]
        # A step keeps its number of samples, whatever was left out.
        if not window.lengths:
            window.add_empty_document(self._eos)
        return window

    def _read_stretch(
        self, window: Window, place: WindowPlace, stretch: Stretch, with_ids: bool
    ) -> None:
        """Adds the pieces of one shard; none of them where the shard as a whole is unusable."""
        shard = self.reader.shard(stretch.shard)
        num_tokens, tokens, eos = shard.num_tokens, shard.tokens, self._eos
        for document, start, stop in self.order.pieces(place.epoch, stretch):
            # Place i of a document's stream has the input t[i] and the label t[i + 1].
            opens, closes = start == 0, stop > num_tokens[document]
            try:
                text = tokens(document, start - 1 + opens, stop - closes)
            except DamagedDataError as error:
                self._leave_out(window, stretch, document, stop - start, error)
                continue
            window.add(text, opens, closes, eos)
            if with_ids:
                window.document_ids.append(self._document_id(stretch.shard, document))

    def _document_id(self, shard: int, document: int) -> str:
        try:
            name: str = self.reader.shard(shard).metadata(document)["id"]
        except DamagedDataError:
            if not self._skips:
                raise
            # Its tokens are sound and trained on: only its name is lost.
            name = f"{self.reader.index.shards[shard].name}, document {document}"
        return name

    def _leave_out(
        self,
        window: Window,
        stretch: Stretch,
        document: int | None,
        num_tokens: int,
        error: DamagedDataError,
    ) -> None:
        """Records places that cannot be read; raises the error where the policy is to stop."""
        if not self._skips:
            raise error
        shard = self.reader.index.shards[stretch.shard].name
        window.skipped.append(
            Skipped(window.number, self._label, shard, document, num_tokens, str(error))
        )


def make_order(
    index: ShardIndex, reader: ShardReader, data: DataConfig, seed: int, key: int
) -> SourceOrder:
    """Returns the order of a source from its index and document tables."""
    return SourceOrder(
        index.shard_stream_tokens,
        reader.stream_tokens,
        seq_len=data.seq_len,
        seed=seed,
        key=key,
        shuffle_block=data.shuffle_block,
    )


def open_samples(data: DataConfig, start: int = 0, split: str = "train") -> Iterator[Sample]:
    """Yields samples start, start + 1, ... for ever.

    The order is a function of the configuration alone, so `start=k` gives what an uninterrupted
    iterator gives after k samples, at no cost in k.

    Args:
        data: sources, seq_len, seed (None counts as 0), shuffle_block, how to read.
        start: first sample number, >= 0.
        split: "train" or "valid".

    Raises:
        InputError: an unusable source, or a damaged shard when it is reached.
        StorageError: the storage does not answer.
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
