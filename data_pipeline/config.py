"""What a run reads: shard folders, their weights and the length of a sample. Stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from data_pipeline.errors import InputError
from data_pipeline.masking import masked
from data_pipeline.quotas import source_quotas
from data_pipeline.storage.interface import StorageOptions

PathText = Annotated[str, "path or URL"]
"""Text of a config file in which ~ and $VARIABLES stand for what they stand for in a shell."""
LocalPathText = Annotated[str, "local path"]
"""A `PathText` that may not be a URL."""
ON_DAMAGE = ("stop", "skip")
_MAX_WEIGHT = 1e18
"""More than the tokens of any corpus; sums of it are still numbers."""
# Those that must be at least 1; the types were checked when the file was decoded.
_COUNTS = (
    "seq_len",
    "shuffle_block",
    "prefetch_steps",
    "reader_threads",
    "read_attempts",
    "cache_bytes",
)


@dataclass(frozen=True)
class SourceConfig:
    """One shard folder and its share of the samples."""

    path: PathText
    """Shard folder written by `megadlcm data prepare`, or its URL (s3://, gs://, http://, ...)."""

    weight: float = 1.0
    """Share of the samples relative to the other sources of the list; any unit, > 0."""

    name: str = ""
    """Name in logs and metrics; empty means the path."""

    def __post_init__(self) -> None:
        """Refuses an empty path and a weight that is no share."""
        if not self.path:
            raise InputError("data source: path is empty; name a folder of `megadlcm data prepare`")
        # A weight of nan would pass any comparison that is written the other way round.
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise InputError(
                f"data source {self.path}: weight = {self.weight}, must be a number > 0; "
                "leave the source out instead of giving it no weight"
            )
        if self.weight > _MAX_WEIGHT:
            raise InputError(
                f"data source {self.path}: weight = {self.weight}, must be <= {_MAX_WEIGHT:g}; "
                "give the weights of all sources in another unit"
            )

    @property
    def label(self) -> str:
        """The name, or the path where no name is given, without a password."""
        return self.name or masked(self.path)


@dataclass(frozen=True)
class DataConfig:
    """The sources of a run and how they are cut into samples of `seq_len` tokens."""

    train: tuple[SourceConfig, ...] = ()
    """Sources of the training samples, mixed by weight."""

    valid: tuple[SourceConfig, ...] = ()
    """Sources of the held-out documents; their weights play no part in an evaluation."""

    seq_len: int = 2048
    """Tokens of one sample; only the last sample of an epoch may be shorter."""

    seed: int | None = None
    """Seed of the order of documents and samples; None means the seed of the run."""

    shuffle_block: int = 16384
    """Samples that are permuted among themselves; 1 keeps the windows in stream order."""

    prefetch_steps: int = 2
    """Global steps read ahead of the training loop."""

    reader_threads: int = 4
    """Threads that read samples side by side, to hide the latency of the storage."""

    on_damage: str = "stop"
    """Shards that are missing or not as written: "stop", or "skip" them and record what."""

    max_skipped_tokens: int = 10_000_000
    """Most tokens a run may leave out by on_damage: skip; then it stops after all."""

    new_phase: bool = False
    """Let a resumed run go on with other train sources or weights, as a recorded new phase."""

    read_attempts: int = StorageOptions.attempts
    """Times a failing read is tried, with growing pauses, before the run ends."""

    timeout_seconds: float = 600.0
    """Longest that the training loop waits for data before the run ends. Several processes wait at
    most 0.8 of `parallel.collective_timeout_seconds`, so that it is the storage that is named."""

    cache_dir: LocalPathText | None = None
    """Folder on a local disk for copies of shards that are read by URL."""

    cache_bytes: int = StorageOptions.cache_bytes
    """Most bytes of copies kept there, by all processes of the machine together."""

    tokenizer: LocalPathText | None = None
    """Tokenizer file or folder; None means the tokenizer.json kept with the shards."""

    def __post_init__(self) -> None:
        """Checks the ranges, and that no two sources of a list share a name."""
        for key in _COUNTS:
            if getattr(self, key) < 1:
                raise InputError(
                    f"data.{key} = {getattr(self, key)}, must be >= 1; give a count",
                    key=f"data.{key}",
                )
        if self.on_damage not in ON_DAMAGE:
            raise InputError(
                f"data.on_damage = {self.on_damage!r}, must be one of {', '.join(ON_DAMAGE)}; "
                "choose one of them",
                key="data.on_damage",
            )
        if self.max_skipped_tokens < 0:
            raise InputError(
                f"data.max_skipped_tokens = {self.max_skipped_tokens}, must be >= 0; give a count",
                key="data.max_skipped_tokens",
            )
        # Without an end a dead storage would hold up every rank for ever.
        if not 0 < self.timeout_seconds < math.inf:
            raise InputError(
                f"data.timeout_seconds = {self.timeout_seconds}, must be > 0; give seconds",
                key="data.timeout_seconds",
            )
        if self.seed is not None and self.seed < 0:
            raise InputError(
                f"data.seed = {self.seed}, must be >= 0; choose another seed", key="data.seed"
            )
        for split in ("train", "valid"):
            labels = [source.label for source in self.sources(split)]
            for label in labels:
                # Metrics and skipped places are kept by name: two sources of one name would mix.
                if labels.count(label) > 1:
                    raise InputError(
                        f"data.{split}: two sources are called {label!r}, names must differ; "
                        "give each its own `name`",
                        key=f"data.{split}",
                    )
        source_quotas(self.train, "train")  # refuses a source that would never be read

    @property
    def storage(self) -> StorageOptions:
        return StorageOptions(
            attempts=self.read_attempts, cache_dir=self.cache_dir, cache_bytes=self.cache_bytes
        )

    def sources(self, split: str) -> tuple[SourceConfig, ...]:
        """Returns the sources of "train" or "valid"; raises InputError for another name."""
        if split not in ("train", "valid"):
            raise InputError(f"split = {split!r}, must be 'train' or 'valid'; choose one of them")
        return self.train if split == "train" else self.valid
