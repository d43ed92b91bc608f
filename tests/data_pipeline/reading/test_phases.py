"""Sources that change in the middle of a run: refused with what differs, or a phase of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.reading.batch import Sample
from data_pipeline.reading.phases import Phase, first_phase, next_phases
from data_pipeline.reading.samples import SampleReader
from tests.support.samples import assert_trained_once
from tests.support.tiny_shards import config_of, one_line, write_numbered_folder

MakeNumbered = Callable[..., SourceConfig]
ONE, TWO, THREE = [1, 7, 40, 3, 1, 90, 16, 15], [5, 60, 1, 1, 30], [9, 9, 9, 50]


@pytest.fixture
def sources(make_numbered: MakeNumbered) -> list[SourceConfig]:
    """Three sources of different shards."""
    return [
        make_numbered(lengths, name=name)
        for name, lengths in (("one", ONE), ("two", TWO), ("three", THREE))
    ]


def weighted(source: SourceConfig, weight: float) -> SourceConfig:
    """The source with another weight."""
    return replace(source, weight=weight)


def read(data: DataConfig, phase: Phase, start: int, stop: int) -> list[Sample]:
    """Samples [start, stop) of a phase."""
    reader = SampleReader(data, phase=phase)
    return [reader.sample(number) for number in range(start, stop)]


def test_unchanged_sources_stay_in_their_phase(sources: Sequence[SourceConfig]) -> None:
    """Also moved, renamed, or read with other threads; and asked for a new phase."""
    data = config_of(*sources[:2])
    phases = [first_phase(data)]
    assert phases[0].first_sample == 0 and [s.key for s in phases[0].sources] == [0, 1]
    moved = Path(sources[0].path).with_name("moved")
    Path(sources[0].path).rename(moved)
    renamed = replace(sources[0], path=str(moved), name="uno")
    for changed in (
        config_of(renamed, sources[1]),
        config_of(renamed, sources[1], new_phase=True, reader_threads=9),
    ):
        assert next_phases(phases, changed, 17) == phases


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: [s[0], weighted(s[1], 3.0)], "two: weight 1 -> 3"),
        (lambda s: [s[0]], r"two: gone \(97 tokens\)"),
        (lambda s: [*s[:2], s[2]], r"three: new \(4 documents, 77 tokens, weight 1\)"),
        (lambda s: [s[1], s[0]], "order of the sources: one, two -> two, one"),
        (
            lambda s: [s[0], replace(s[2], name="two")],
            "two: other shards, 5 documents, 97 tokens -> 4 documents, 77 tokens",
        ),
    ],
)
def test_a_change_is_refused_with_what_differs(
    change: Callable[[Sequence[SourceConfig]], list[SourceConfig]],
    said: str,
    sources: Sequence[SourceConfig],
) -> None:
    """In one line with the way out; asked for, it is a phase."""
    phases = [first_phase(config_of(*sources[:2]))]
    changed = config_of(*change(sources))
    with pytest.raises(InputError, match=said) as error:
        next_phases(phases, changed, 40)
    assert "data.new_phase=true" in one_line(error)
    found = next_phases(phases, replace(changed, new_phase=True), 40)
    assert found[:1] == phases and found[1].first_sample == 40
    assert [Phase.from_dict(phase.to_dict()) for phase in found] == found
    assert next_phases(found, changed, 41) == found  # and a restart after that is none


def test_sources_go_on_where_they_were(sources: Sequence[SourceConfig]) -> None:
    """Weights change twice, one source comes and one goes and returns: epochs stay whole."""
    one, two, three = sources
    plans = [
        (config_of(one, weighted(two, 3.0)), 37),
        (config_of(weighted(one, 5.0), three, new_phase=True), 101),
        (config_of(two, weighted(one, 2.0), three, new_phase=True), 200),
    ]
    phases = [first_phase(plans[0][0])]
    samples: list[Sample] = []
    for data, end in plans:
        phases = next_phases(phases, data, len(samples))
        samples += read(data, phases[-1], len(samples), end)
    assert [phase.first_sample for phase in phases] == [0, 37, 101]
    assert [sample.index for sample in samples] == list(range(200))
    for name, lengths in (("one", ONE), ("two", TWO), ("three", THREE)):
        own = [sample for sample in samples if sample.source == name]
        whole_epochs = {sample.epoch for sample in own} - {own[-1].epoch}
        assert whole_epochs
        for epoch in whole_epochs:
            assert_trained_once([s for s in own if s.epoch == epoch], lengths)
        assert [sample.epoch for sample in own] == sorted(sample.epoch for sample in own)
    # each phase has its own weights
    last = Counter(sample.source for sample in samples[101:197])
    assert last == {"one": 48, "two": 24, "three": 24}


def test_a_phase_that_forgets_what_was_read_is_caught(sources: Sequence[SourceConfig]) -> None:
    """Negative control of the test above."""
    data = config_of(*sources[:2])
    phases = [first_phase(data)]
    changed = config_of(weighted(sources[0], 2.0), sources[1], new_phase=True)
    phases = next_phases(phases, changed, 11)
    forgetful = replace(
        phases[1],
        sources=tuple(replace(source, first_turn=0) for source in phases[1].sources),
    )
    for phase, sound in ((phases[1], True), (forgetful, False)):
        samples = read(data, phases[0], 0, 11) + read(changed, phase, 11, 60)
        own = [s for s in samples if s.source == "one" and s.epoch == 0]
        if sound:
            assert_trained_once(own, ONE)
        else:
            with pytest.raises(AssertionError):
                assert_trained_once(own, ONE)


def test_the_same_shards_twice_are_told_apart_by_name(tmp_path: Path) -> None:
    """They have orders of their own, and each goes on with its own."""
    write_numbered_folder(tmp_path / "n", ONE, 50)
    left, right = (SourceConfig(str(tmp_path / "n"), 1.0, name) for name in ("left", "right"))
    phases = [first_phase(config_of(left, right))]
    changed = config_of(right, weighted(left, 3.0), new_phase=True)
    new = next_phases(phases, changed, 10)[1]
    assert [(source.name, source.key, source.first_turn) for source in new.sources] == [
        ("right", 1, 5),
        ("left", 0, 5),
    ]
