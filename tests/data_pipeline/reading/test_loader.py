"""Steps for data-parallel ranks: same global batch for every layout, errors heard, clean end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import open_samples
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import InputError, StorageError
from data_pipeline.reading.batch import StepBatch, batch_digest, sample_digest
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.packing import Window
from data_pipeline.reading.samples import SampleReader
from tests.support.tiny_shards import config_of, one_line

MakeNumbered = Callable[..., SourceConfig]
LENGTHS = [1, 7, 40, 3, 1, 90, 16, 15, 17, 2, 33]


def read_steps(
    data: DataConfig, ranks: int, micro_batch_size: int, num_steps: int, start: int = 0
) -> list[list[StepBatch]]:
    """Returns [step][rank] of a global batch of 8."""
    by_rank: list[list[StepBatch]] = []
    for rank in range(ranks):
        loader = StepLoader(
            data,
            global_batch_size=8,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            start_sample=start,
        )
        by_rank.append(list(islice(loader, num_steps)))
        loader.close()
    return [list(step) for step in zip(*by_rank, strict=True)]


def global_tokens(step: list[StepBatch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, labels and token indices of a step over all ranks."""
    batches = [batch for rank in step for batch in rank.micro_batches]
    return (
        np.concatenate([batch.tokens_T for batch in batches]),
        np.concatenate([batch.labels_T for batch in batches]),
        np.concatenate([batch.token_index_T for batch in batches]),
    )


def digest(step: list[StepBatch]) -> str:
    """Returns the digest of a step over all ranks."""
    return batch_digest(digest for rank in step for digest in rank.sample_digests)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_every_layout_reads_the_same_global_batch(
    ranks: int, micro_batch_size: int, make_numbered: MakeNumbered
) -> None:
    """Tokens, labels, global token indices and digests, over an epoch's end."""
    data = config_of(make_numbered(LENGTHS), seed=1)
    expected = read_steps(data, 1, 1, 4)
    found = read_steps(data, ranks, micro_batch_size, 4)
    for left, right in zip(expected, found, strict=True):
        assert digest(left) == digest(right)
        for one, other in zip(global_tokens(left), global_tokens(right), strict=True):
            assert np.array_equal(one, other)
        assert {rank.first_sample for rank in right} == {left[0].first_sample}
        assert all(len(rank.micro_batches) == 8 // ranks // micro_batch_size for rank in right)
    digests = [digest(step) for step in found]
    assert len(set(digests)) == len(digests)


def test_a_step_holds_the_samples_of_the_stream(make_numbered: MakeNumbered) -> None:
    """Step 2 from sample 3 on: samples 11 to 18, each at seq_len times its slot."""
    data = config_of(make_numbered(LENGTHS), seed=1)
    step = read_steps(data, 2, 2, 2, start=3)[1]
    samples = list(islice(open_samples(data, start=11), 8))
    assert step[0].first_sample == 11
    batches = [batch for rank in step for batch in rank.micro_batches]
    assert [number for batch in batches for number in batch.sample_ids] == list(range(11, 19))
    assert digest(step) == batch_digest(
        sample_digest(sample.index, sample.tokens_T) for sample in samples
    )
    tokens, labels, index = global_tokens(step)
    assert np.array_equal(tokens, np.concatenate([sample.tokens_T for sample in samples]))
    assert np.array_equal(labels, np.concatenate([sample.labels_T for sample in samples]))
    places = [slot * 16 + np.arange(len(sample.tokens_T)) for slot, sample in enumerate(samples)]
    assert np.array_equal(index, np.concatenate(places))
    for batch in batches:
        assert batch.cu_seqlens.dtype == np.int32 and batch.cu_seqlens[-1] == batch.num_tokens
        assert (np.diff(batch.cu_seqlens) > 0).all()


def test_the_digest_is_the_documented_one(make_numbered: MakeNumbered) -> None:
    """Anybody can recompute it from sample numbers and tokens."""
    import hashlib

    sample = next(open_samples(config_of(make_numbered([3])), start=5))
    contents = (5).to_bytes(8, "little") + b"".join(
        int(token).to_bytes(4, "little") for token in sample.tokens_T
    )
    single = hashlib.sha256(contents).digest()
    assert sample_digest(sample.index, sample.tokens_T) == single
    assert batch_digest([single, single]) == hashlib.sha256(single + single).hexdigest()


def test_an_error_of_the_reading_thread_reaches_the_caller(make_numbered: MakeNumbered) -> None:
    """After the steps read before it, each time it is asked again, and close still works."""
    source = make_numbered([5] * 40, shard_tokens=5)
    data = config_of(source, seq_len=6, shuffle_block=1, prefetch_steps=1)
    # every document is a shard and a step of its own
    order = [sample.document_ids for sample in islice(open_samples(data), 40)]
    sound_steps = order.index(("39",))
    assert 0 < sound_steps < 39
    broken = sorted(Path(source.path).glob("*.tar"))[-1]
    broken.unlink()
    loader = StepLoader(data, global_batch_size=1, micro_batch_size=1)
    read = 0
    with pytest.raises(InputError, match=f"{broken.name}: missing") as error:
        for _ in range(40):
            next(loader)
            read += 1
    one_line(error)
    assert read == sound_steps
    with pytest.raises(InputError, match=broken.name):
        next(loader)
    loader.close()


@pytest.mark.parametrize("reader_threads", [1, 3])
def test_close_ends_the_threads_and_the_iteration(
    reader_threads: int, make_numbered: MakeNumbered
) -> None:
    """Also while they wait with all read ahead; closing twice is harmless."""
    before = threading.active_count()
    data = config_of(make_numbered(LENGTHS), reader_threads=reader_threads)
    loader = StepLoader(data, global_batch_size=2, micro_batch_size=1)
    next(loader)
    assert threading.active_count() == before + reader_threads
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("reader_threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(
    reader_threads: int, make_numbered: MakeNumbered
) -> None:
    """Steps come in order, whoever read them first."""
    source = make_numbered(LENGTHS, shard_tokens=20)
    expected = read_steps(config_of(source, reader_threads=1, prefetch_steps=1), 1, 2, 9)
    found = read_steps(config_of(source, reader_threads=reader_threads), 1, 2, 9)
    assert [digest(step) for step in found] == [digest(step) for step in expected]
    assert [step[0].first_sample for step in found] == list(range(0, 72, 8))


def test_no_more_is_read_ahead_than_asked_for(make_numbered: MakeNumbered) -> None:
    """Memory is bounded by data.prefetch_steps."""
    data = config_of(make_numbered(LENGTHS), prefetch_steps=2, reader_threads=3)
    reader = SampleReader(data)
    numbers: list[int] = []
    sound = reader.window

    def counted(number: int, with_ids: bool = False) -> Window:
        numbers.append(number)
        return sound(number, with_ids)

    reader.window = counted  # type: ignore[method-assign]
    loader = StepLoader(data, global_batch_size=4, micro_batch_size=2, reader=reader)
    next(loader)
    while len(numbers) < 12:  # the step that was taken, and two more
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(numbers) == list(range(12))
    loader.close()


def test_storage_that_never_answers_ends_the_wait(
    make_numbered: MakeNumbered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the name of the shard; closing does not wait for it either."""
    monkeypatch.setattr("data_pipeline.reading.loader.SAY_SECONDS", 0.05)
    monkeypatch.setattr("data_pipeline.reading.loader.CLOSE_SECONDS", 0.05)
    release = threading.Event()

    def stuck(*_: object) -> bytes:
        release.wait(60)
        return b""

    monkeypatch.setattr("data_pipeline.storage.local.os.pread", stuck)
    data = config_of(make_numbered(LENGTHS), timeout_seconds=0.3)
    loader = StepLoader(data, global_batch_size=2, micro_batch_size=1)
    with pytest.raises(StorageError, match=r"no data for 0\.3 s, .*shard-0.*\.tar") as error:
        next(loader)
    one_line(error)
    assert "waiting for data, still reading" in caplog.text
    with pytest.raises(StorageError):
        next(loader)
    loader.close()
    release.set()


def test_sizes_that_do_not_divide_are_refused(make_numbered: MakeNumbered) -> None:
    """Before a thread is started."""
    data = config_of(make_numbered([3]))
    with pytest.raises(InputError, match="global_batch_size = 6") as error:
        StepLoader(data, global_batch_size=6, micro_batch_size=2, data_parallel_size=2)
    one_line(error)
    with pytest.raises(InputError, match="global_batch_size = 0"):
        StepLoader(data, global_batch_size=0, micro_batch_size=1)
