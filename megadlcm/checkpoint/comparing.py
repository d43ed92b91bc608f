"""What two checkpoints do not share, by the fingerprints in their manifests: no data is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megadlcm.checkpoint.folder import Checkpoint
from megadlcm.checkpoint.format import MASTER

_NOTHING = f"{0:016x}"


@dataclass(frozen=True)
class TensorDifference:
    """Of one tensor."""

    name: str
    kinds: list[str]
    """`master` and kinds of optimizer state that differ."""
    reason: str = ""
    """Why they cannot be compared; empty where they can."""


@dataclass(frozen=True)
class Difference:
    """Of two checkpoints."""

    steps: tuple[int, int]
    tensors: list[TensorDifference]
    num_equal: int
    """Tensors that are bit-equal, with their optimizer state."""
    unknown: str = ""
    """Why no values can be compared; empty where they can."""
    counters: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Counters of the training that differ."""

    @property
    def is_equal(self) -> bool:
        """Whether parameters, buffers and optimizer state are known to be the same."""
        return not self.tensors and not self.unknown


def compare(one: Checkpoint, other: Checkpoint) -> Difference:
    """Compares two checkpoints, whatever layouts wrote them."""
    pair = (("the first", one), ("the second", other))
    lacking = [which for which, each in pair if not each.manifest.fingerprints]
    unknown = f"values unknown: {' and '.join(lacking)} has no fingerprints" if lacking else ""
    found, num_equal = [], 0
    shapes = one.index.shapes, other.index.shapes
    for name in shapes[0] | shapes[1]:
        each = _compare(one, other, name, bool(unknown))
        if each.kinds or each.reason:
            found.append(each)
        else:
            num_equal += 1
    counts = [each.description["train_state"] for each in (one, other)]
    keys = counts[0].keys() | counts[1].keys()
    counters = {
        key: (counts[0].get(key), counts[1].get(key))
        for key in sorted(keys)
        if counts[0].get(key) != counts[1].get(key)
    }
    steps = one.step, other.step
    return Difference(steps, found, 0 if unknown else num_equal, unknown, counters)


def _compare(one: Checkpoint, other: Checkpoint, name: str, is_unknown: bool) -> TensorDifference:
    shapes = [each.index.shapes.get(name) for each in (one, other)]
    if None in shapes:
        return TensorDifference(
            name, [], f"only in the {'second' if shapes[0] is None else 'first'}"
        )
    if shapes[0] != shapes[1]:
        return TensorDifference(name, [], f"shapes {shapes[0]} and {shapes[1]}")
    if is_unknown:
        return TensorDifference(name, [])
    sums = [_sums(each, name) for each in (one, other)]
    # a buffer has no state, which counts as zero where a checkpoint has that of parameters
    pairs = {kind: [each.get(kind, _NOTHING) for each in sums] for kind in sums[0] | sums[1]}
    return TensorDifference(name, [kind for kind, (a, b) in pairs.items() if a != b])


def _sums(checkpoint: Checkpoint, name: str) -> dict[str, str]:
    kinds = (MASTER, *checkpoint.manifest.keys)
    return dict(zip(kinds, checkpoint.manifest.fingerprints.get(name, ()), strict=False))
