"""Weights as whole quotas of a period of samples. Stdlib only: a config is refused by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from data_pipeline.errors import InputError

MAX_PERIOD = 4096
"""Samples of the longest period: most of a mixture's order that is kept in memory at once."""


class Weighted(Protocol):
    """A source with a share."""

    @property
    def label(self) -> str:
        """Name in messages."""
        ...

    @property
    def weight(self) -> float:
        """Share relative to the other sources."""
        ...


def source_quotas(sources: Sequence[Weighted], split: str) -> tuple[int, ...]:
    """Returns the samples of each source in one period.

    Decimal weights are taken as written: 0.5, 0.25, 0.15, 0.1 give 10, 5, 3, 2. Where the exact
    period would exceed MAX_PERIOD the quotas of a period of that length are rounded by largest
    remainder.

    Raises:
        InputError: a source too light to have one sample in the longest period.
    """
    # From the text: the float 0.1 has a period of 2**55.
    weights = [Fraction(str(source.weight)) for source in sources]
    total = sum(weights, Fraction(0))
    shares = [weight / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return tuple(int(share * period) for share in shares)
    exact = [share * MAX_PERIOD for share in shares]
    quotas = [math.floor(quota) for quota in exact]
    # Ties by number, so that the same weights always give the same quotas.
    by_remainder = sorted(range(len(exact)), key=lambda s: (quotas[s] - exact[s], s))
    for source in by_remainder[: MAX_PERIOD - sum(quotas)]:
        quotas[source] += 1
    for number, (source_config, quota) in enumerate(zip(sources, quotas, strict=True)):
        if quota == 0:
            raise InputError(
                f"data.{split}[{number}].weight = {source_config.weight} ({source_config.label}), "
                f"must be at least 1/{MAX_PERIOD} of the sum {float(total):g}; raise it or leave "
                "the source out",
                key=f"data.{split}[{number}].weight",
            )
    return tuple(quotas)


def rounded_shares(sources: Sequence[Weighted]) -> list[str]:
    """Says which sources are read at another share than their weight asks for.

    Quotas are whole numbers of at most MAX_PERIOD; a share that this moves by more than one
    percent of itself is named.

    Returns:
        A phrase for each such source; empty where weights are met.
    """
    quotas = source_quotas(sources, "train")
    weights = [Fraction(str(source.weight)) for source in sources]
    phrases = []
    for source, weight, quota in zip(sources, weights, quotas, strict=True):
        asked, given = float(weight / sum(weights)), quota / sum(quotas)
        if abs(given / asked - 1) > 0.01:
            phrases.append(f"{source.label} {given:.3%} instead of {asked:.3%}")
    return phrases
