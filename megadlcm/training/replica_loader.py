"""Steps for the processes of one replica: one of them reads, each gets what its stage needs.

    reader --- sizes, documents, sample numbers ---> every process of the replica
           --- inputs ---------------------------> processes with the token embedding
           --- labels ---------------------------> processes with the head

So storage is asked once per replica, and all its processes train on the same bytes by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.config import DataConfig
from data_pipeline.reading.batch import PackedBatch, Skipped, StepBatch
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.packing import token_index
from data_pipeline.reading.phases import Phase
from data_pipeline.reading.samples import SampleReader
from megadlcm.config import RunConfig
from megadlcm.engine.state import TrainState
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.watch.activity import doing
from megadlcm.plan.stages import cut_chunks

_SHARE_OF_PATIENCE = 0.8
"""Of the wait of processes for each other: who waits for the storage speaks first."""

ABSENT = -1
"""Stands for every token on a stage that needs none: an embedding or a loss would refuse it."""


class _Shape(NamedTuple):
    """A micro-batch without its tokens."""

    cu_seqlens: np.ndarray
    sample_ids: tuple[int, ...]
    sample_ends: tuple[int, ...]


class _Step(NamedTuple):
    """What every process of a replica is told of a step."""

    micro_batches: list[_Shape]
    first_sample: int
    skipped: tuple[Skipped, ...]


class ReplicaLoader(Iterator[StepBatch]):
    """Yields this process's part of each step; close it when done. next() is collective."""

    def __init__(
        self,
        loader: StepLoader | None,
        mesh: ParallelMesh,
        seq_len: int,
        embedding_stage: int,
        head_stage: int,
    ) -> None:
        """Prepares the exchange; nothing is read or sent yet.

        Args:
            loader: this replica's share of the data where the process reads it, else None.
            mesh: ranks of this process.
            seq_len: tokens of a full sample.
            embedding_stage: stage that needs the inputs.
            head_stage: stage that needs the labels.
        """
        assert (loader is not None) == mesh.reads_data
        self._loader, self._mesh, self._seq_len = loader, mesh, seq_len
        self._embedding_stage, self._head_stage = embedding_stage, head_stage
        self._ranks = mesh.replica_ranks()
        self._data_rank = self._ranks[0][0]  # the one for which `reads_data` holds
        self._group = mesh.model_parallel_group if len(self._ranks) > 1 else None

    def __next__(self) -> StepBatch:
        """Returns the next step; raises what reading it raised, on the process that read it."""
        if self._loader is None:
            return self._receive()
        # Others wait for this step too: what they say of this process must be that it reads. How
        # long reading may take is data.timeout_seconds, so it counts as computing.
        with doing("reading of the step's data", computes=True):
            batch = next(self._loader)
        if self._group is not None:
            self._send(batch)
        return batch

    def close(self) -> None:
        """Stops reading."""
        if self._loader is not None:
            self._loader.close()

    def _send(self, batch: StepBatch) -> None:
        shapes = [
            _Shape(packed.cu_seqlens, packed.sample_ids, packed.sample_ends)
            for packed in batch.micro_batches
        ]
        # documents first and to all: every stage needs them, and they give the sizes of the rest
        self._share(_Step(shapes, batch.first_sample, batch.skipped))
        inputs = _joined([packed.tokens_T for packed in batch.micro_batches])
        labels = _joined([packed.labels_T for packed in batch.micro_batches])
        for rank, stage in self._ranks:
            if rank == self._mesh.rank:
                continue
            # ids are large and needed at the two ends of the model only; stages between get none
            for tokens, needed in ((inputs, self._embedding_stage), (labels, self._head_stage)):
                if stage == needed:
                    with doing(f"replica send of tokens to rank {rank}"):
                        dist.send(tokens, dst=rank, group=self._group)

    def _receive(self) -> StepBatch:
        step: _Step = self._share(None)
        sizes = [shape.sample_ends[-1] for shape in step.micro_batches]
        stage = self._mesh.pipeline_rank
        # in the order in which they are sent
        inputs = self._tokens(sizes, stage == self._embedding_stage)
        labels = self._tokens(sizes, stage == self._head_stage)
        batches = [
            PackedBatch(
                tokens_T,
                labels_T,
                shape.cu_seqlens,
                token_index(
                    [sample - step.first_sample for sample in shape.sample_ids],
                    np.diff(shape.sample_ends, prepend=0).tolist(),
                    self._seq_len,
                ),
                shape.sample_ids,
                shape.sample_ends,
            )
            for shape, tokens_T, labels_T in zip(step.micro_batches, inputs, labels, strict=True)
        ]
        return StepBatch(tuple(batches), step.first_sample, step.skipped)

    def _tokens(self, sizes: list[int], needed: bool) -> list[np.ndarray]:
        """Receives the inputs or labels of all micro-batches, where they are needed."""
        if not needed:
            # an id that no embedding has: a stage that reads them by mistake fails at once
            return [np.full(size, ABSENT, dtype=np.int64) for size in sizes]
        tokens = torch.empty(sum(sizes), dtype=torch.int32)
        with doing(f"replica recv of tokens from rank {self._data_rank}"):
            dist.recv(tokens, src=self._data_rank, group=self._group)
        return np.split(tokens.numpy().astype(np.int64), np.cumsum(sizes)[:-1])

    def _share(self, step: _Step | None) -> Any:
        values = [step]
        with doing(f"replica broadcast of documents from rank {self._data_rank}"):
            dist.broadcast_object_list(
                values, src=self._data_rank, group=self._group, device=torch.device("cpu")
            )
        return values[0]


def open_loader(
    config: RunConfig, mesh: ParallelMesh, state: TrainState | None = None
) -> ReplicaLoader:
    """Opens this process's part of the data.

    Args:
        config: the run.
        mesh: ranks of this process.
        state: where the run stands; None: at its beginning.

    Returns:
        The loader; to be closed.
    """
    state = state or TrainState()
    parallel, loader = config.parallel, None
    # one process of each replica reads; the storage is asked once, however many share a model
    if mesh.reads_data:
        phase = Phase.from_dict(state.data_phases[-1]) if state.data_phases else None
        loader = StepLoader(
            _patient_data(config, mesh),
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=mesh.data_parallel_rank,
            data_parallel_size=mesh.data_parallel_size,
            start_sample=state.consumed_samples,
            reader=SampleReader(config.data, phase=phase),
        )
    chunks = cut_chunks(
        config.model,
        config.data.seq_len,
        parallel.pipeline_parallel_size,
        parallel.pipeline_placement,
    )
    return ReplicaLoader(loader, mesh, config.data.seq_len, chunks[0].stage, chunks[-1].stage)


def _patient_data(config: RunConfig, mesh: ParallelMesh) -> DataConfig:
    """The data settings, with a wait for the storage that ends before the others' for this one."""
    if mesh.world_size == 1:
        return config.data
    longest = _SHARE_OF_PATIENCE * config.parallel.collective_timeout_seconds
    return replace(config.data, timeout_seconds=min(config.data.timeout_seconds, longest))


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    """Returns tokens as they travel: int32, half of what the device will hold."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))
