"""Plays the order of a run from its indexes alone: what it trains on, which shards it touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.errors import InputError
from data_pipeline.inspection.played import BlockCost, PlayedSource
from data_pipeline.options import check_least
from data_pipeline.quotas import source_quotas
from data_pipeline.reading.least_recent import KEPT_BYTES, KEPT_SHARDS
from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.open_files import most_files
from data_pipeline.shard_format.index import read_index
from data_pipeline.storage.open import open_storage
from data_pipeline.tables import render_table

MOST_SAMPLES = 10_000_000
"""Samples in one simulation; about 200 bytes of memory each."""


class SourceFigures(NamedTuple):
    """What one source gives in a simulation."""

    label: str
    weight: float
    quota: int
    """Samples of each period of the mixture."""
    num_samples: int
    num_tokens: int
    end_epochs: float
    """Epochs behind it at the end of the simulation."""
    run_epochs: float
    """Epochs behind it at the end of the run."""
    epoch_tokens: int
    """Stream tokens of one epoch."""
    whole_epochs: int
    """Epochs that lie in the simulation as a whole: each window of theirs was seen once."""
    block: BlockCost
    """The largest shuffle block of the simulation."""


class StepFigures(NamedTuple):
    """Distinct shards that one optimizer step touches."""

    job_mean: float
    job_max: int
    rank_mean: float
    rank_max: int


class Simulation(NamedTuple):
    """What a stretch of a run does."""

    start: int
    num_samples: int
    period: int
    """Samples in which the mixture meets its quotas exactly."""
    sources: tuple[SourceFigures, ...]
    steps: StepFigures
    num_steps: int
    """Whole steps that the figures of the steps are taken over."""
    open_shards: int
    """Most shards that one reading process keeps open."""
    cache_bytes: int
    """Of the tar files of one shuffle block of every source."""


@dataclass(frozen=True)
class RunShape:
    """What a simulation must know of the run besides its data."""

    global_batch_size: int
    data_parallel_size: int
    train_samples: int
    """Samples of the whole run."""


class Simulator:
    """A stretch of the samples of a run, played."""

    def __init__(self, data: DataConfig, start: int, num_samples: int) -> None:
        """Reads the indexes of the train sources and plays the stretch.

        Args:
            data: sources, seq_len, seed (None counts as 0), shuffle_block.
            start: first sample, >= 0.
            num_samples: 1 to MOST_SAMPLES.

        Raises:
            InputError: no source, an unusable one, or too many samples.
            StorageError: the storage does not answer.
        """
        if not data.train:
            raise InputError(
                "data.train = [], must name a shard folder; add {path: FOLDER}", key="data.train"
            )
        check_least("--start", start, 0, "count from the run's beginning")
        if not 1 <= num_samples <= MOST_SAMPLES:
            raise InputError(
                f"--samples {num_samples}: must be 1 to {MOST_SAMPLES}; play a longer stretch in "
                "parts with --start",
                key="--samples",
            )
        self.data, self.start, self.num_samples = data, start, num_samples
        self.mixture = Mixture(source_quotas(data.train, "train"), data.seed or 0)
        self.sources = [
            PlayedSource(
                read_index(source.path, open_storage(source.path, data.storage)), data, key
            )
            for key, source in enumerate(data.train)
        ]
        self.owners = self._owners()
        # Where each source stands when the stretch begins: nothing before it is played.
        before = self.mixture.counts(start)
        self.played = [
            source.play(start + np.flatnonzero(self.owners == key), first)
            for key, (source, first) in enumerate(zip(self.sources, before, strict=True))
        ]

    def figures(self, shape: RunShape) -> Simulation:
        """Returns what the stretch does.

        Raises:
            InputError: the global batch cannot be shared by the ranks.
            AssertionError: the order breaks one of its promises.
        """
        self._check_quotas()
        sources = tuple(self._source_figures(shape, key) for key in range(len(self.sources)))
        steps, num_steps, open_shards = self._step_figures(shape)
        return Simulation(
            start=self.start,
            num_samples=self.num_samples,
            period=self.mixture.period,
            sources=sources,
            steps=steps,
            num_steps=num_steps,
            open_shards=open_shards,
            cache_bytes=sum(source.block.tar_bytes for source in sources),
        )

    def lines(self) -> Iterator[str]:
        """Yields one line per sample: number, source, epoch, stream places, shards."""
        # Each source has its own list of samples; `nexts` says how far into it the mixture is.
        nexts = [0] * len(self.sources)
        for number, owner in enumerate(self.owners.tolist(), self.start):
            at, played, source = nexts[owner], self.played[owner], self.sources[owner]
            nexts[owner] += 1
            epoch = int(played.epochs[at])
            order, _ = source.shard_order(epoch)
            turns = range(int(played.first_turns[at]), int(played.last_turns[at]) + 1)
            shards = " ".join(source.index.shards[int(order[turn])].name for turn in turns)
            places = f"[{played.starts[at]}, {played.stops[at]})"
            yield f"{number}  {self.data.train[owner].label}  epoch {epoch}  {places}  {shards}"

    def _owners(self) -> np.ndarray:
        """Returns the source of each sample, int64 (num_samples,)."""
        # The mixture of one source is no mixture: a million lookups are spared.
        if len(self.sources) == 1:
            return np.zeros(self.num_samples, dtype=np.int64)
        numbers = range(self.start, self.start + self.num_samples)
        return np.fromiter(
            (self.mixture.turn(number).source for number in numbers), np.int64, self.num_samples
        )

    def _check_quotas(self) -> None:
        """Raises AssertionError where a whole period does not meet the quotas exactly."""
        period = self.mixture.period
        # Samples until the first period that begins inside of the stretch.
        first = -self.start % period
        whole = (self.num_samples - first) // period
        if whole > 0:
            periods = self.owners[first : first + whole * period].reshape(whole, period)
            for source, quota in enumerate(self.mixture.quotas):
                if ((periods == source).sum(axis=1) != quota).any():
                    raise AssertionError(f"source {source} does not meet its quota in a period")

    def _source_figures(self, shape: RunShape, key: int) -> SourceFigures:
        source, played, config = self.sources[key], self.played[key], self.data.train[key]
        end = self.start + self.num_samples
        return SourceFigures(
            label=config.label,
            weight=float(config.weight),
            quota=self.mixture.quotas[key],
            num_samples=len(played.samples),
            num_tokens=int((played.stops - played.starts).sum()),
            end_epochs=self.mixture.counts(end)[key] / source.num_windows,
            run_epochs=self.mixture.counts(shape.train_samples)[key] / source.num_windows,
            epoch_tokens=source.index.num_stream_tokens,
            whole_epochs=source.whole_epochs(played),
            block=source.largest_block(played),
        )

    def _step_figures(self, shape: RunShape) -> tuple[StepFigures, int, int]:
        batch, ranks = shape.global_batch_size, shape.data_parallel_size
        if batch % ranks:
            raise InputError(
                f"--data-parallel-size {ranks}: training.global_batch_size = {batch} must be a "
                "multiple of it; change one of them",
                key="--data-parallel-size",
            )
        numbers: list[np.ndarray] = []
        shards: list[np.ndarray] = []
        offsets = self._shard_offsets()
        open_shards = 0
        for source, played, offset in zip(self.sources, self.played, offsets, strict=True):
            entries, touched = source.touched(played)
            numbers.append(played.samples[entries])
            shards.append(touched + offset)
            open_shards += len(np.unique(touched))
        sample, shard = np.concatenate(numbers), np.concatenate(shards)
        # Steps that the stretch cuts would count too few shards: only whole ones are measured.
        first_step = -(-self.start // batch)
        num_steps = max((self.start + self.num_samples) // batch - first_step, 0)
        inside = (sample >= first_step * batch) & (sample < (first_step + num_steps) * batch)
        # Slots r*G/dp .. (r+1)*G/dp of a step are those of rank r, so one division finds step and
        # rank.
        rank = sample[inside] // (batch // ranks) - first_step * ranks
        job = _distinct(rank // ranks, shard[inside], num_steps)
        each = _distinct(rank, shard[inside], num_steps * ranks)
        figures = StepFigures(*_mean_and_max(job), *_mean_and_max(each))
        return figures, num_steps, min(open_shards, most_files())

    def _shard_offsets(self) -> list[int]:
        """Returns what to add to each source's shard numbers; one number per folder."""
        offsets: dict[str, int] = {}
        total = 0
        for source in self.sources:
            # A folder that serves as two sources is one set of files, opened once.
            if source.index.location not in offsets:
                offsets[source.index.location] = total
                total += len(source.index.shards)
        return [offsets[source.index.location] for source in self.sources]


def _distinct(groups: np.ndarray, shards: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns the number of different shards of each group, int64 (num_groups,)."""
    if not len(groups):
        return np.zeros(num_groups, dtype=np.int64)
    width = int(shards.max()) + 1
    # One number for a pair: finding different rows of two columns is slower.
    pairs = np.unique(groups * width + shards)
    return np.bincount(pairs // width, minlength=num_groups)


def _mean_and_max(counts: Sequence[int] | np.ndarray) -> tuple[float, int]:
    return (float(np.mean(counts)), int(np.max(counts))) if len(counts) else (0.0, 0)


def render_simulation(found: Simulation, data: DataConfig, shape: RunShape) -> str:
    """Returns what `megadlcm data simulate` prints."""
    # What the table cannot hold is told as facts; advice comes last, and only where it is needed.
    whole = sum(source.whole_epochs for source in found.sources)
    steps, end = found.steps, found.start + found.num_samples
    enough = "enough" if data.cache_bytes >= found.cache_bytes else "TOO SMALL"
    facts = [
        ("samples", f"{found.start:,} to {end - 1:,} of {shape.train_samples:,} of the run"),
        ("mixture", f"every period of {found.period:,} samples gives each source its quota"),
        ("steps", f"{found.num_steps:,} whole ones of {shape.global_batch_size:,} samples"),
        ("shards a step", f"mean {steps.job_mean:.1f}, most {steps.job_max:,} (whole job)"),
        (
            "shards a rank",
            f"mean {steps.rank_mean:.1f}, most {steps.rank_max:,} a step "
            f"(data-parallel size {shape.data_parallel_size:,})",
        ),
        ("open shards", f"at most {found.open_shards:,} in a reading process"),
        (
            "cache",
            f"{found.cache_bytes:,} bytes hold one shuffle block of every source; "
            f"data.cache_bytes = {data.cache_bytes:,} is {enough} (only URLs are cached)",
        ),
        ("checked", f"no window twice in an epoch; in {whole:,} whole epochs each window once"),
    ]
    for source in found.sources:
        block = source.block
        if block.num_shards > KEPT_SHARDS and block.table_bytes > KEPT_BYTES:
            advice = (
                f"a shuffle block of {source.label} touches {block.num_shards:,} shards, whose "
                f"tables have {block.table_bytes:,} bytes; a process keeps {KEPT_BYTES:,} at hand "
                "and reads them again and again; lower data.shuffle_block"
            )
            facts.append(("slow", advice))
    return f"{_source_table(found.sources)}\n\n{render_table((), facts, left=(0, 1))}"


def _source_table(sources: Sequence[SourceFigures]) -> str:
    columns = {
        "weight": [f"{source.weight:g}" for source in sources],
        "quota": [f"{source.quota:,}" for source in sources],
        "samples": [f"{source.num_samples:,}" for source in sources],
        "tokens": [f"{source.num_tokens:,}" for source in sources],
        "epochs at end": [f"{source.end_epochs:.4g}" for source in sources],
        "epoch tokens": [f"{source.epoch_tokens:,}" for source in sources],
        "epochs of run": [f"{source.run_epochs:.4g}" for source in sources],
        "block shards": [f"{source.block.num_shards:,}" for source in sources],
        "block bytes": [f"{source.block.tar_bytes:,}" for source in sources],
    }
    labels = [source.label for source in sources]
    return render_table(("source", *columns), list(zip(labels, *columns.values(), strict=True)))
