"""One trillion tokens in 100,000 shards: the order holds, and a process that reads it stays small.

The shards exist nowhere: the index is written, the lengths of documents are functions of the
shard's number. What is right is said by benchmarks/order_checks.py, from the permutations alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.order_checks import (
    check_all,
    check_block,
    check_period,
    check_sample,
    check_token,
    random_place,
)
from benchmarks.trillion_tokens import (
    GOALS,
    MIX,
    NUM_SHARDS,
    in_fresh_process,
    open_mixture,
    open_sources,
    write_folders,
)
from data_pipeline.reading.mixture import Mixture, Turn
from data_pipeline.reading.order import SourceOrder, WindowPlace

EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trillion")
    sizes = write_folders(path)
    assert sizes["all"] < 12e6  # 104 bytes a shard
    return path


@pytest.mark.parametrize("names", [["all"], list(MIX)], ids=["one folder", "four folders"])
def test_the_order_of_a_trillion_tokens_agrees_with_a_slow_one(
    folder: Path, names: list[str]
) -> None:
    sources = open_sources(folder, names)
    corpora = [source.corpus for source in sources]
    assert sum(corpus.num_stream_tokens for corpus in corpora) > 1e12
    assert sum(len(corpus.shard_stream_tokens) for corpus in corpora) == NUM_SHARDS
    checked = check_all(corpora, open_mixture(names), num_samples=100, num_epochs=EPOCHS)
    assert min(checked.values()) >= 100


class ShiftedOrder(SourceOrder):
    """Begins every window one place late."""

    def place(self, number: int) -> WindowPlace:
        epoch, start, stop = super().place(number)
        return WindowPlace(epoch, start + 1, stop)


class RepeatingOrder(SourceOrder):
    """Gives the windows of epoch 0 again and again."""

    def place(self, number: int) -> WindowPlace:
        return super().place(number % self.num_windows)


class CarelessMixture(Mixture):
    """Gives one sample of every period to another source."""

    def turn(self, sample: int) -> Turn:
        return Turn(0, sample) if sample % self.period == 1 else super().turn(sample)


@pytest.mark.parametrize("wrong", [ShiftedOrder, RepeatingOrder])
def test_the_checks_notice_an_order_that_is_wrong(folder: Path, wrong: Any) -> None:
    corpus = open_sources(folder, ["math"])[0].corpus
    shape = corpus._asdict()
    order = wrong(shape.pop("shard_stream_tokens"), shape.pop("document_stream_tokens"), **shape)
    chosen, failed = random.Random(0), 0
    for _ in range(5):
        try:
            check_sample(corpus, order, corpus.num_windows + chosen.randrange(10**6), 1)
            check_token(corpus, order, random_place(corpus, 1, chosen))
        except AssertionError:
            failed += 1
    assert failed == 5


def test_the_checks_notice_windows_that_overlap_and_quotas_that_are_not_met(folder: Path) -> None:
    corpus = open_sources(folder, ["math"])[0].corpus
    check_block(corpus, corpus.order(), 1, 3)
    with pytest.raises(AssertionError):
        check_block(corpus._replace(shuffle_block=1000), corpus.order(), 1, 3)
    names = list(MIX)
    sound = open_mixture(names)
    assert check_period(sound, 12345) == sound.period > 1
    with pytest.raises(AssertionError):
        check_period(CarelessMixture(sound.quotas, seed=7), 12345)


@pytest.mark.parametrize("names", [["all"], list(MIX)], ids=["one folder", "four folders"])
def test_a_fresh_process_opens_and_seeks_in_little_memory(folder: Path, names: list[str]) -> None:
    found = in_fresh_process(folder, names, seed=1)
    # a number that is no memory of a process with numpy would be read from the wrong place
    assert 15 < found["peak_mebibytes"] < GOALS["mebibytes"]
