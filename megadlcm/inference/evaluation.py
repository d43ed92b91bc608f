"""Held-out loss, bits per byte, tokens per concept by domain, loss by position inside a concept.

Deterministic: evaluation mode thresholds boundaries and draws nothing. A document is trained and
evaluated alike: inputs [eos, t1..tn], labels [t1..tn, eos]; longer ones are cut into windows of
`data.seq_len`, each of which starts afresh. Bits per byte count every label, the end of the
document included, over the bytes of the text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.reading.shards import Document, open_documents
from megadlcm.config import RunConfig
from megadlcm.model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.model.units import MicroBatch, run_each
from megadlcm.parallel.mesh import ParallelMesh

Passes = Callable[[Sequence[MicroBatch], Callable[[int, ModelOutput], None]], None]
"""Runs micro-batches and hands index and output to a function, where outputs appear."""
NUM_POSITIONS = 20
"""Positions inside a concept that are reported; the boundary token is position 0."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Windows of documents, packed."""

    tokens_T: np.ndarray
    """int64 (T,)."""
    labels_T: np.ndarray
    """int64 (T,)."""
    cu_seqlens: np.ndarray
    """int32 (S+1,)."""
    domain_T: np.ndarray
    """Index of the domain of each token, int64 (T,)."""


@dataclass
class DomainSums:
    """Sums over the tokens of each domain; rows follow `domains`."""

    domains: list[str]
    """Names, sorted."""
    num_bytes: Tensor
    """UTF-8 bytes of the texts, fp64 (domains,)."""
    sums: Tensor
    """Cross-entropy, tokens, boundaries, fp64 (3, domains)."""
    by_position: Tensor
    """Cross-entropy and tokens at each position inside a concept, fp64 (2, NUM_POSITIONS)."""
    has_concepts: bool
    """Whether the model segments at all."""

    def to_row(self) -> dict[str, Any]:
        """Divides once: the entries of an evaluation row of metrics.jsonl."""
        # divided only here: sums of replicas and batches add up, means do not
        nats, tokens, boundaries = (self.sums[index].tolist() for index in range(3))
        num_bytes = self.num_bytes.tolist()
        row: dict[str, Any] = {
            "eval_loss": sum(nats) / sum(tokens),
            "eval_tokens": int(sum(tokens)),
            # over bytes, so that tokenizers can be compared
            "bits_per_byte": sum(nats) / math.log(2) / sum(num_bytes),
            "bits_per_byte_by_domain": {
                domain: nats[index] / math.log(2) / num_bytes[index]
                for index, domain in enumerate(self.domains)
            },
            "loss_by_domain": {
                domain: nats[index] / tokens[index] for index, domain in enumerate(self.domains)
            },
        }
        if self.has_concepts:
            row["tokens_per_concept"] = {
                domain: tokens[index] / boundaries[index]
                for index, domain in enumerate(self.domains)
            }
            row["tokens_per_concept_overall"] = sum(tokens) / sum(boundaries)
            row["loss_by_position"] = [
                # no concept of the held-out text is that long
                total / count if count else None
                for total, count in zip(*self.by_position.tolist(), strict=True)
            ]
        return row


class Evaluator:
    """Evaluates a model on the held-out documents of a run.

    Args:
        config: the run; `data.valid` and the evaluation section are read.
        mesh: replicas that share the work.
        eos_id: the token between documents.
    """

    def __init__(self, config: RunConfig, mesh: ParallelMesh, eos_id: int) -> None:
        self.config = config
        self.mesh = mesh
        self.eos_id = eos_id
        self.documents = [
            document
            for source in config.data.valid
            for document in open_documents(
                source.path, config.evaluation.max_documents, config.data.storage
            )
        ]
        self.domains = sorted({document.domain for document in self.documents})

    def run(self, model: LanguageModel, passes: Passes | None = None) -> dict[str, Any]:
        """Evaluates; the model is back in its mode afterwards.

        Args:
            model: the model, or what this process holds of it.
            passes: runs it where it is cut into stages; None calls it.

        Returns:
            The evaluation row, without its step.
        """
        was_training = model.training
        # thresholded boundaries: what is measured is what decoding will do
        model.eval()
        sums = self._empty_sums()
        own = [
            batch
            for index, batch in enumerate(self.batches())
            # whole batches in turn, the same on every process of a replica
            if index % self.mesh.data_parallel_size == self.mesh.data_parallel_rank
        ]
        inputs = [self._to_device(batch) for batch in own]
        run = passes or functools.partial(run_each, model)
        run(inputs, lambda index, output: self._add(sums, output, own[index]))
        # not `num_bytes`: every process has counted all documents
        for tensor in (sums.sums, sums.by_position):
            self.mesh.sum_over_run(tensor)
        model.train(was_training)
        return sums.to_row()

    def _empty_sums(self) -> DomainSums:
        device = self.mesh.device
        num_bytes = torch.zeros(len(self.domains), dtype=torch.float64)
        for document in self.documents:
            num_bytes[self.domains.index(document.domain)] += document.num_bytes
        return DomainSums(
            self.domains,
            num_bytes,
            torch.zeros(3, len(self.domains), dtype=torch.float64, device=device),
            torch.zeros(2, NUM_POSITIONS, dtype=torch.float64, device=device),
            # else the row has no entries about concepts, rather than zeros
            self.config.model.architecture == "dlcm",
        )

    def _to_device(self, batch: EvaluationBatch) -> MicroBatch:
        device = self.mesh.device
        return MicroBatch(
            torch.from_numpy(batch.tokens_T).to(device),
            torch.from_numpy(batch.cu_seqlens).to(device),
        )

    def _add(self, sums: DomainSums, output: ModelOutput, batch: EvaluationBatch) -> None:
        labels_T, domain_T = (
            torch.from_numpy(array).to(self.mesh.device)
            for array in (batch.labels_T, batch.domain_T)
        )
        # sums over a corpus, in an order that depends on the layout
        loss_T = output.token_losses(labels_T).double()
        sums.sums[0].index_add_(0, domain_T, loss_T)
        sums.sums[1].index_add_(0, domain_T, torch.ones_like(loss_T))
        if output.boundary_mask_T is None:
            return
        sums.sums[2].index_add_(0, domain_T, output.boundary_mask_T.double())
        position_T = position_in_concept(output.boundary_mask_T)
        # the tail is left out, not put into the last position: it would not be one
        near = position_T < NUM_POSITIONS
        sums.by_position[0].index_add_(0, position_T[near], loss_T[near])
        sums.by_position[1].index_add_(0, position_T[near], torch.ones_like(loss_T[near]))

    def batches(self) -> Iterator[EvaluationBatch]:
        """Packs the windows of all documents into batches of at most `batch_tokens` tokens."""
        windows: list[tuple[np.ndarray, np.ndarray, int]] = []
        size = 0
        for document in self.documents:
            domain = self.domains.index(document.domain)
            for tokens_T, labels_T in self._windows(document):
                # at least one window a batch, also where a window is longer than the limit
                if windows and size + len(tokens_T) > self.config.evaluation.batch_tokens:
                    yield _pack(windows)
                    windows, size = [], 0
                windows.append((tokens_T, labels_T, domain))
                size += len(tokens_T)
        if windows:
            yield _pack(windows)

    def _windows(self, document: Document) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        # as in training: a document's first token is predicted from an end-of-text
        stream = np.concatenate(([self.eos_id], document.tokens_T, [self.eos_id])).astype(np.int64)
        tokens_T, labels_T = stream[:-1], stream[1:]
        for start in range(0, len(tokens_T), self.config.data.seq_len):
            stop = start + self.config.data.seq_len
            yield tokens_T[start:stop], labels_T[start:stop]


def _pack(windows: list[tuple[np.ndarray, np.ndarray, int]]) -> EvaluationBatch:
    lengths = [len(tokens_T) for tokens_T, _, _ in windows]
    return EvaluationBatch(
        np.concatenate([tokens_T for tokens_T, _, _ in windows]),
        np.concatenate([labels_T for _, labels_T, _ in windows]),
        np.cumsum([0, *lengths]).astype(np.int32),
        np.repeat([domain for _, _, domain in windows], lengths).astype(np.int64),
    )


def position_in_concept(mask_T: Tensor) -> Tensor:
    """Tokens since the newest boundary, 0 at the boundary itself; bool (T,) to int64 (T,)."""
    index_T = torch.arange(mask_T.numel(), device=mask_T.device)
    # documents begin with a boundary, so no position counts over from the one before
    start_T = torch.where(mask_T, index_T, torch.zeros_like(index_T)).cummax(0).values
    return index_T - start_T
