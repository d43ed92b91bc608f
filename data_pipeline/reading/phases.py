"""Phases of a run: from which sample on it reads which sources, and where those stood then.

A run has one phase unless it is resumed with other train sources or weights and data.new_phase.
A source that stays goes on where it was, in its own order and epoch; a new one begins at its start.
So every token of an epoch is still trained once, and the state of the data remains the number of
consumed samples and, per phase, a few integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.quotas import source_quotas
from data_pipeline.reading.mixture import Mixture
from data_pipeline.shard_format.index import ShardIndex, read_index
from data_pipeline.storage.open import open_storage


@dataclass(frozen=True)
class PhaseSource:
    """A source in a phase."""

    name: str
    """Label of the source, for people."""
    weight: float
    fingerprint: str
    """ShardIndex.fingerprint: the same source wherever it lies and whatever it is called."""
    num_documents: int
    num_tokens: int
    key: int
    """Number that its permutations are drawn with."""
    first_turn: int
    """Samples it gave before the phase."""

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class Phase:
    """Samples from `first_sample` on."""

    first_sample: int
    sources: tuple[PhaseSource, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for a checkpoint, as JSON gives it back."""
        return {
            "first_sample": self.first_sample,
            "sources": [asdict(source) for source in self.sources],
        }

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Phase:
        sources = tuple(PhaseSource(**source) for source in saved["sources"])
        return Phase(saved["first_sample"], sources)


def first_phase(data: DataConfig) -> Phase:
    """Returns the only phase of a run that begins with these train sources."""
    return Phase(
        0, tuple(_placed(*each, number, 0) for number, each in enumerate(_described(data)))
    )


def next_phases(earlier: Sequence[Phase], data: DataConfig, consumed_samples: int) -> list[Phase]:
    """Returns the phases of a run that is resumed.

    Args:
        earlier: those of its checkpoint, at least one.
        data: its configuration now.
        consumed_samples: samples that were consumed.

    Returns:
        The earlier phases; one more where sources or weights have changed.

    Raises:
        InputError: they have changed and data.new_phase is not set; says what has.
    """
    last = earlier[-1]
    described = _described(data)
    changes = _differences(last, described)
    if not changes:
        return list(earlier)
    if not data.new_phase:
        raise InputError(
            f"data.train has changed since the checkpoint ({'; '.join(changes)}), so its samples "
            "would be others; restore it, start another output_dir, or set data.new_phase=true to "
            f"go on with the new sources from sample {consumed_samples} on",
            key="data.train",
        )
    stands = _stands(earlier, consumed_samples, data.seed or 0)
    # Never a key again: the order of a source that left must not come back under a new one.
    next_key = 1 + max(stands)
    sources: list[PhaseSource] = []
    for config, index in described:
        kept = [key for key, known in stands.items() if known.fingerprint == index.fingerprint]
        # twice the same shards: the one of that name goes on
        kept.sort(key=lambda key: (stands[key].name != config.label, key))
        if kept:
            sources.append(_placed(config, index, kept[0], stands.pop(kept[0]).first_turn))
        else:
            sources.append(_placed(config, index, next_key, 0))
            next_key += 1
    return [*earlier, Phase(consumed_samples, tuple(sources))]


def _stands(phases: Sequence[Phase], consumed_samples: int, seed: int) -> dict[int, PhaseSource]:
    """Returns by key every source that was ever read, with the samples it has given so far."""
    stands: dict[int, PhaseSource] = {}
    ends = [*(phase.first_sample for phase in phases[1:]), consumed_samples]
    for phase, end in zip(phases, ends, strict=True):
        mixture = Mixture(source_quotas(phase.sources, "train"), seed)
        # Counted, not saved: the state of the data is a number of samples and the phases.
        given = mixture.counts(end - phase.first_sample)
        for source, count in zip(phase.sources, given, strict=True):
            stands[source.key] = replace(source, first_turn=source.first_turn + count)
    return stands


def _described(data: DataConfig) -> list[tuple[SourceConfig, ShardIndex]]:
    return [
        (source, read_index(source.path, open_storage(source.path, data.storage)))
        for source in data.train
    ]


def _placed(config: SourceConfig, index: ShardIndex, key: int, turn: int) -> PhaseSource:
    return PhaseSource(
        name=config.label,
        weight=float(config.weight),
        fingerprint=index.fingerprint,
        num_documents=index.num_documents,
        num_tokens=index.num_tokens,
        key=key,
        first_turn=turn,
    )


def _differences(last: Phase, described: Sequence[tuple[SourceConfig, ShardIndex]]) -> list[str]:
    """Returns what has changed since a phase, for people; nothing where its order is the same."""
    # By the bytes and the weights: a folder that moved or was renamed changes no sample.
    then = [(source.fingerprint, source.weight) for source in last.sources]
    now = [(index.fingerprint, float(config.weight)) for config, index in described]
    if then == now:
        return []
    before = {source.name: source for source in last.sources}
    after = {config.label: (config, index) for config, index in described}
    found = [
        f"{name}: gone ({before[name].num_tokens:,} tokens)" for name in before if name not in after
    ]
    for name, (config, index) in after.items():
        size = f"{index.num_documents:,} documents, {index.num_tokens:,} tokens"
        if name not in before:
            found.append(f"{name}: new ({size}, weight {config.weight:g})")
            continue
        old = before[name]
        if old.fingerprint != index.fingerprint:
            was = f"{old.num_documents:,} documents, {old.num_tokens:,} tokens"
            found.append(f"{name}: other shards, {was} -> {size}")
        if old.weight != config.weight:
            found.append(f"{name}: weight {old.weight:g} -> {config.weight:g}")
    names = [", ".join(labels) for labels in (before, after)]
    return found or [f"order of the sources: {names[0]} -> {names[1]}"]
