"""A simulation agrees with the order that training reads, and with plain counting."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import read_index
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError
from data_pipeline.inspection.simulate import RunShape, Simulator, render_simulation
from data_pipeline.quotas import source_quotas
from data_pipeline.reading.least_recent import KEPT_SHARDS
from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.order import WINDOW_ORDER, SourceOrder, Stretch, WindowPlace, permutation
from tests.support.tiny_shards import config_of, one_line

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [30, 5, 1, 20, 9, 44, 17, 12, 3, 28, 31, 2, 60, 19]


def without_shards(source: SourceConfig) -> SourceConfig:
    """The folder with its index and nothing else."""
    kept = {"index.json", "shards.npy"}
    for path in Path(source.path).iterdir():
        if path.name not in kept:
            path.unlink()
    assert {path.name for path in Path(source.path).iterdir()} == kept
    return source


def mixed(make_numbered: MakeNumbered, **options: object) -> DataConfig:
    """Three sources of different sizes, their shards gone."""
    return config_of(
        without_shards(make_numbered(LENGTHS, 60, "en", 0.5)),
        without_shards(make_numbered(LENGTHS[:5], 30, "zh", 0.3)),
        without_shards(make_numbered(LENGTHS[4:12], 300, "code", 0.2)),
        **options,
    )


def plainly(
    data: DataConfig, start: int, count: int
) -> list[tuple[int, WindowPlace, list[Stretch]]]:
    """Source, place and stretches of each sample, one after the other by the order itself."""

    def unread(shard: int) -> np.ndarray:
        raise AssertionError("a document table was read")

    mixture = Mixture(source_quotas(data.train, "train"), data.seed or 0)
    orders = [
        SourceOrder(
            read_index(source.path).shard_stream_tokens,
            unread,
            seq_len=data.seq_len,
            seed=data.seed or 0,
            key=key,
            shuffle_block=data.shuffle_block,
        )
        for key, source in enumerate(data.train)
    ]
    found = []
    for number in range(start, start + count):
        turn = mixture.turn(number)
        place = orders[turn.source].place(turn.number)
        found.append((turn.source, place, orders[turn.source].stretches(place)))
    return found


@pytest.mark.parametrize(
    ("start", "seq_len", "shuffle_block"),
    [(0, 16, 16384), (7, 16, 1), (3, 5, 4), (200, 64, 3), (10**6, 11, 2), (0, 1000, 7)],
)
def test_every_sample_is_where_training_reads_it(
    start: int, seq_len: int, shuffle_block: int, make_numbered: MakeNumbered
) -> None:
    """Over several epochs, with windows in one shard and across many."""
    data = mixed(make_numbered, seq_len=seq_len, shuffle_block=shuffle_block, seed=3)
    count = 150
    expected = plainly(data, start, count)
    lines = list(Simulator(data, start, count).lines())
    for number, (line, (source, place, stretches)) in enumerate(
        zip(lines, expected, strict=True), start
    ):
        shards = " ".join(f"shard-{stretch.shard:06d}" for stretch in stretches)
        label = data.train[source].name
        where = f"[{place.start}, {place.stop})"
        assert line == f"{number}  {label}  epoch {place.epoch}  {where}  {shards}"
    assert len({place.epoch for _, place, _ in expected}) > 1 or seq_len == 5
    if seq_len == 64:
        assert max(len(stretches) for *_, stretches in expected) > 2


@pytest.mark.parametrize(("start", "ranks"), [(0, 1), (16, 4), (5, 2), (1000, 8)])
def test_figures_are_those_of_plain_counting(
    start: int, ranks: int, make_numbered: MakeNumbered
) -> None:
    """Tokens, epochs, and the shards of each step and rank."""
    data = mixed(make_numbered, seq_len=16, shuffle_block=4, seed=1)
    count, batch = 203, 8
    expected = plainly(data, start, count)
    found = Simulator(data, start, count).figures(RunShape(batch, ranks, 4000))
    tokens: Counter[int] = Counter()
    by_rank: defaultdict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    by_step: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    steps = range(-(-start // batch), (start + count) // batch)
    for number, (source, place, stretches) in enumerate(expected, start):
        tokens[source] += place.stop - place.start
        step, slot = divmod(number, batch)
        for stretch in stretches if step in steps else ():
            by_rank[step, slot // (batch // ranks)].add((source, stretch.shard))
            by_step[step].add((source, stretch.shard))
    assert found.num_steps == len(steps) > 20
    assert len(by_rank) == len(steps) * ranks
    for sets, mean, most in (
        (by_step, found.steps.job_mean, found.steps.job_max),
        (by_rank, found.steps.rank_mean, found.steps.rank_max),
    ):
        sizes = [len(shards) for shards in sets.values()]
        assert mean == pytest.approx(np.mean(sizes)) and most == max(sizes)
    mixture = Mixture(source_quotas(data.train, "train"), 1)
    for key, figures in enumerate(found.sources):
        index = read_index(data.train[key].path)
        windows = -(-index.num_stream_tokens // 16)
        assert figures.num_tokens == tokens[key]
        assert figures.num_samples == sum(owner == key for owner, *_ in expected)
        assert figures.epoch_tokens == index.num_stream_tokens
        assert figures.end_epochs == mixture.counts(start + count)[key] / windows
        assert figures.run_epochs == mixture.counts(4000)[key] / windows
        seen = Counter(place.epoch for owner, place, _ in expected if owner == key)
        assert figures.whole_epochs == sum(number == windows for number in seen.values())
    assert sum(source.whole_epochs for source in found.sources) > 3
    assert [source.quota for source in found.sources] == [5, 3, 2] and found.period == 10


def test_a_block_costs_the_shards_it_touches(make_numbered: MakeNumbered) -> None:
    """All of them, as a cache must hold them; by a set per block."""
    data = mixed(make_numbered, seq_len=16, shuffle_block=4)
    count = 120
    found = Simulator(data, 0, count).figures(RunShape(8, 2, 8))
    blocks: defaultdict[tuple[int, int, int], set[int]] = defaultdict(set)
    for source, place, stretches in plainly(data, 0, 3000):
        block = place.start // 16 // 4
        blocks[source, place.epoch, block] |= {stretch.shard for stretch in stretches}
    inside = {
        (source, place.epoch, place.start // 64) for source, place, _ in plainly(data, 0, count)
    }
    for key, figures in enumerate(found.sources):
        sizes = read_index(data.train[key].path).shards.rows["tar_bytes"]
        own = [blocks[name] for name in inside if name[0] == key]
        assert figures.block.num_shards == max(len(shards) for shards in own)
        assert figures.block.tar_bytes == max(int(sizes[list(shards)].sum()) for shards in own)
    assert found.cache_bytes == sum(source.block.tar_bytes for source in found.sources)
    assert found.sources[0].block.num_shards > 1


def test_a_folder_that_serves_twice_has_its_shards_once(make_numbered: MakeNumbered) -> None:
    """A step that reads one shard through two sources opens one file."""
    source = make_numbered(LENGTHS, 10_000, "one")
    data = config_of(source, SourceConfig(source.path, 1.0, "again"))
    assert len(read_index(source.path).shards) == 1
    found = Simulator(data, 0, 64).figures(RunShape(16, 1, 64))
    assert (found.steps.job_mean, found.steps.job_max) == (1.0, 1)
    shutil.copytree(source.path, f"{source.path}-2")
    data = config_of(source, SourceConfig(f"{source.path}-2", 1.0, "again"))
    assert Simulator(data, 0, 64).figures(RunShape(16, 1, 64)).steps.job_max == 2


@pytest.mark.parametrize("fault", ["twice", "left out"])
def test_a_broken_order_is_found(
    fault: str, make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the line `checked` would say nothing."""

    def broken(size: int, seed: int, *key: int) -> np.ndarray:
        order = permutation(size, seed, *key)
        if key[0] == WINDOW_ORDER and size > 4:
            order[0] = order[1] if fault == "twice" else size
        return order

    data = mixed(make_numbered, seq_len=16)
    shape = RunShape(8, 1, 200)
    assert Simulator(data, 0, 200).figures(shape).sources[0].whole_epochs > 0
    monkeypatch.setattr("data_pipeline.reading.order.permutation", broken)
    with pytest.raises(AssertionError, match="a window "):
        Simulator(data, 0, 200).figures(shape)


def test_quotas_that_are_not_met_are_found(make_numbered: MakeNumbered) -> None:
    """In any whole period, wherever the simulation begins."""
    simulator = Simulator(mixed(make_numbered), 7, 40)
    simulator.figures(RunShape(8, 1, 200))
    simulator.owners[20] = (simulator.owners[20] + 1) % 3
    with pytest.raises(AssertionError, match="does not meet its quota"):
        simulator.figures(RunShape(8, 1, 200))


def test_what_is_wrong_is_said_in_one_line(make_numbered: MakeNumbered) -> None:
    """With the way out."""
    data = mixed(make_numbered)
    for start, count, message in (
        (-1, 5, "--start -1: must be >= 0"),
        (0, 0, "--samples 0: must be 1 to"),
        (0, 10**12, "play a longer stretch in parts"),
    ):
        with pytest.raises(InputError, match=message) as error:
            Simulator(data, start, count)
        one_line(error)
    with pytest.raises(InputError, match=r"data\.train = \[\]") as error:
        Simulator(DataConfig(), 0, 5)
    one_line(error)
    with pytest.raises(InputError, match=r"--data-parallel-size 3: .* must be a multiple") as error:
        Simulator(data, 0, 64).figures(RunShape(16, 3, 64))
    one_line(error)


def test_a_stretch_shorter_than_a_step_has_figures(make_numbered: MakeNumbered) -> None:
    """There is no step to speak of, and sources may have no sample."""
    data = mixed(make_numbered)
    found = Simulator(data, 0, 1).figures(RunShape(512, 4, 512))
    assert found.num_steps == 0 and found.steps.job_max == 0
    assert sorted(source.num_samples for source in found.sources) == [0, 0, 1]
    assert "0 whole ones of 512 samples" in render_simulation(found, data, RunShape(512, 4, 512))


def test_advice_on_the_cache_and_on_a_block_of_more_than_is_kept(
    make_numbered: MakeNumbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both cost time in a long run and are seen here first."""
    source = without_shards(make_numbered([10] * (KEPT_SHARDS + 8), 10, "tiny"))
    data = config_of(source, cache_bytes=1000)
    shape = RunShape(4, 1, 40)
    shown = render_simulation(Simulator(data, 0, 20).figures(shape), data, shape)
    assert "data.cache_bytes = 1,000 is TOO SMALL" in shown
    # so small that all of their tables are kept
    assert f"touches {KEPT_SHARDS + 8} shards" not in shown
    monkeypatch.setattr("data_pipeline.inspection.simulate.KEPT_BYTES", 1000)
    shown = render_simulation(Simulator(data, 0, 20).figures(shape), data, shape)
    assert f"touches {KEPT_SHARDS + 8} shards" in shown and "shuffle_block" in shown
    calm = config_of(source, shuffle_block=4)
    shown = render_simulation(Simulator(calm, 0, 20).figures(shape), calm, shape)
    assert "is enough" in shown and "shuffle_block" not in shown
