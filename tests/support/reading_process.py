"""A process that reads as a training run does: steps by all ranks, its place saved now and then.

python -m tests.support.reading_process FOLDER DATA_PARALLEL_SIZE

FOLDER holds call.pickle (a DataConfig); the place is kept in FOLDER/consumed_samples. Prints
"FIRST_SAMPLE DIGEST" of every global batch, for ever: it is there to be killed.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from pathlib import Path

from data_pipeline.reading.batch import batch_digest
from data_pipeline.reading.loader import StepLoader

GLOBAL_BATCH_SIZE = 8
STEPS_PER_SAVE = 3


def main(folder: Path, data_parallel_size: int) -> None:
    """Reads from the saved place on."""
    data = pickle.loads((folder / "call.pickle").read_bytes())
    place = folder / "consumed_samples"
    consumed = int(place.read_text()) if place.exists() else 0
    loaders = [
        StepLoader(
            data,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=1,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
            start_sample=consumed,
        )
        for rank in range(data_parallel_size)
    ]
    for number in itertools.count(1):
        steps = [next(loader) for loader in loaders]
        digest = batch_digest(digest for step in steps for digest in step.sample_digests)
        print(steps[0].first_sample, digest, flush=True)
        consumed += GLOBAL_BATCH_SIZE
        if number % STEPS_PER_SAVE == 0:
            unfinished = folder / "consumed_samples.unfinished"
            unfinished.write_text(str(consumed))
            os.replace(unfinished, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
