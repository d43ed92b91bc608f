"""What a run reads: shard folders, their weights and the length of a sample. Stdlib only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.errors import InputError


@dataclass(frozen=True)
class SourceConfig:
    """One shard folder and its share of the samples."""

    path: str
    """Shard folder written by `megadlcm data prepare`."""

    weight: float = 1.0
    """Share of the samples relative to the other sources of the list; any unit, > 0."""

    name: str = ""
    """Name in logs and metrics; empty means the path."""

    def __post_init__(self) -> None:
        """Refuses an empty path and a weight that is no share."""
        if not self.path:
            raise InputError("data source: path is empty; name a folder of `megadlcm data prepare`")
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise InputError(
                f"data source {self.path}: weight = {self.weight}, must be a number > 0; "
                "leave the source out instead of giving it no weight"
            )

    @property
    def label(self) -> str:
        """The name, or the path where no name is given."""
        return self.name or self.path


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
    """Global steps read ahead of the training loop by the loader's thread."""

    tokenizer: str | None = None
    """Tokenizer file or folder; None means the tokenizer.json kept with the shards."""

    def __post_init__(self) -> None:
        """Checks the ranges and that no two sources of a list share a name."""
        for key in ("seq_len", "shuffle_block", "prefetch_steps"):
            if getattr(self, key) < 1:
                raise InputError(f"data.{key} = {getattr(self, key)}, must be >= 1; give a count")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"data.seed = {self.seed}, must be >= 0; choose another seed")
        for split in ("train", "valid"):
            labels = [source.label for source in self.sources(split)]
            for label in labels:
                if labels.count(label) > 1:
                    raise InputError(
                        f"data.{split}: two sources are called {label!r}, names must differ; "
                        "give each its own `name`"
                    )

    def sources(self, split: str) -> tuple[SourceConfig, ...]:
        """Returns the sources of "train" or "valid"; raises InputError for another name."""
        if split not in ("train", "valid"):
            raise InputError(f"split = {split!r}, must be 'train' or 'valid'; choose one of them")
        return self.train if split == "train" else self.valid
