"""Which source gives sample n: weights as whole quotas of a period, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.reading.least_recent import LeastRecent
from data_pipeline.reading.order import MIXTURE_ORDER, permutation

SPREAD = 64
"""Places that are shuffled among themselves, so that any stretch of samples is near its shares."""


class Turn(NamedTuple):
    """Whose turn a sample is."""

    source: int
    """Number of the source in its list."""
    number: int
    """How many samples that source has given before."""


class Mixture:
    """Gives every source its exact quota in each period, spread evenly and shuffled a little."""

    def __init__(self, quotas: Sequence[int], seed: int) -> None:
        """Keeps the quotas (samples of each source in a period, all >= 1) and the seed."""
        self.quotas = tuple(quotas)
        self.period = sum(self.quotas)
        self._seed = seed
        self._even = _even_order(self.quotas)
        self._orders: LeastRecent[int, tuple[np.ndarray, np.ndarray]] = LeastRecent(4)

    def turn(self, sample: int) -> Turn:
        """Returns the source of a sample and its number there, O(1) in the sample number."""
        if len(self.quotas) == 1:
            return Turn(0, sample)
        period, offset = divmod(sample, self.period)
        sources, earlier = self._orders.get_or_make(period, lambda: self._order(period))
        source = int(sources[offset])
        return Turn(source, period * self.quotas[source] + int(earlier[offset]))

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first `samples` samples each source gives."""
        if len(self.quotas) == 1:
            return [samples]
        period, offset = divmod(samples, self.period)
        sources, _ = self._orders.get_or_make(period, lambda: self._order(period))
        begun = np.bincount(sources[:offset], minlength=len(self.quotas)).tolist()
        return [period * quota + own for quota, own in zip(self.quotas, begun, strict=True)]

    def _order(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns per place of the period the source, and its earlier samples in the period."""
        # Shuffled among SPREAD neighbours only: any stretch stays within a few samples of its
        # shares.
        blocks = [
            first
            + permutation(
                min(SPREAD, self.period - first), self._seed, MIXTURE_ORDER, period, first // SPREAD
            )
            for first in range(0, self.period, SPREAD)
        ]
        sources = self._even[np.concatenate(blocks)]
        # Numbered before the shuffle, an entry would not know its rank after it: count again.
        earlier = np.empty(self.period, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            earlier[sources == source] = np.arange(quota)
        return sources, earlier


def _even_order(quotas: Sequence[int]) -> np.ndarray:
    """Returns the sources of one period, each at even distances: int64 (period,)."""
    sources = np.repeat(np.arange(len(quotas)), quotas)
    # Middle of each of the quota's equal intervals: the k-th of n stands at (k + 1/2) / n.
    times = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
    return sources[np.argsort(times, kind="stable")]
