"""The index of a checkpoint of hundreds of processes: its size, and what one rank's load costs.

    python -m benchmarks.checkpoint_index --config configs/dlcm_2.3b.yaml --ranks 512

Slices are made by rule, without processes: stage 3 cuts every tensor over all replicas, stages 1
and 2 cut the concatenation of all tensors.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine
from megadlcm.checkpoint.folder import array_places
from megadlcm.checkpoint.format import rank_file_name
from megadlcm.checkpoint.index import Index, Range, Shape
from megadlcm.checkpoint.slices import whole_shapes
from megadlcm.config import load_config
from megadlcm.parallel.partition import make_partition

Cut = Callable[[dict[str, Shape], int], list[list[Range]]]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/dlcm_2.3b.yaml"))
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    partition = make_partition(load_config(arguments.config))
    shapes = whole_shapes(partition)
    num_parameters = sum(spec.is_parameter for spec in partition.specs.values())
    cuts: dict[str, Cut] = {"stage 1": cut_flat, "stage 3": cut_each}
    results: dict[str, Any] = {"machine": machine(), "ranks": arguments.ranks, "layouts": {}}
    for name, cut in cuts.items():
        results["layouts"][name] = measure(shapes, num_parameters, cut, arguments.ranks)
    path = arguments.results / "checkpoint_index.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def measure(shapes: dict[str, Shape], num_parameters: int, cut: Cut, ranks: int) -> dict[str, Any]:
    """Size and times of the index of so many ranks, read by three quarters as many."""
    held = cut(shapes, ranks)
    started = time.perf_counter()
    content = Index.of(shapes, num_parameters, held).encode()
    built = time.perf_counter() - started
    started = time.perf_counter()
    index = Index.decode(content)
    decoded = time.perf_counter() - started
    started = time.perf_counter()
    array_places(index, [rank_file_name(rank) for rank in range(ranks)], ["exp_avg", "exp_avg_sq"])
    placed = time.perf_counter() - started
    fewer = cut(shapes, ranks * 3 // 4)
    plans = {}
    for label, wanted in (("same layout", held[ranks // 2]), ("fewer ranks", fewer[ranks // 3])):
        started = time.perf_counter()
        copies = [copy for part in wanted for copy in index.plan(part)]
        plans[label] = {"seconds": time.perf_counter() - started, "copies": len(copies)}
    return {
        "rows": len(index.rows),
        "bytes": len(content),
        "build seconds": built,
        "decode seconds": decoded,
        "places seconds": placed,
        "plan of one rank": plans,
        "peak resident MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def cut_each(shapes: dict[str, Shape], ranks: int) -> list[list[Range]]:
    """Every tensor over all ranks."""
    wholes = [Range.whole(name, shape) for name, shape in shapes.items()]
    parts = [[whole.part(rank, ranks) for whole in wholes] for rank in range(ranks)]
    return [[part for part in own if len(part)] for own in parts]


def cut_flat(shapes: dict[str, Shape], ranks: int) -> list[list[Range]]:
    """The concatenation of all tensors over all ranks."""
    wholes: Sequence[Range] = [Range.whole(name, shape) for name, shape in shapes.items()]
    total = sum(len(whole) for whole in wholes)
    held: list[list[Range]] = [[] for _ in range(ranks)]
    begin = 0
    for whole in wholes:
        end = begin + len(whole)
        for rank in range(begin * ranks // total, min(ranks - 1, end * ranks // total) + 1):
            low = max(begin, total * rank // ranks)
            high = min(end, total * (rank + 1) // ranks)
            if low < high:
                held[rank].append(Range(whole.tensor, whole.piece, low - begin, high - begin))
        begin = end
    return held


if __name__ == "__main__":
    main()
